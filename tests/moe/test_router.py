"""Tests of routers and of the MoE layer on real ranks against brute force."""

import copy

import pytest
import torch
import torch.distributed as dist

from tests import megatron
from tests.collectives import counted_collectives
from tests.distributed import run_ranks


def _router_and_layer(model):
    layer = model[0].decoder.layers[-1].mlp
    return layer.router, layer


def _gathered(local: torch.Tensor, group) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _set_thresholds(router, values: torch.Tensor) -> None:
    router.thresholds.average.zero_()
    router.thresholds.updates.zero_()
    router.thresholds._updates_on_host = 0
    for _ in range(max(router.config.et_warmup_iters, 1)):
        router.thresholds.update(values)


# Expert choice


def expert_choice_on_ranks(kind: str) -> None:
    _, _, model = megatron.start("--router-type", "expert-choice")
    router, _ = _router_and_layer(model)
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.randn(32, 3 * world, 4, generator=torch.Generator().manual_seed(1))
    if kind == "tied":
        whole = whole.round()
    if kind == "constant":
        whole[:] = 0.25
    probs, routing_map = router.routing(whole[:, 3 * rank : 3 * rank + 3].contiguous())
    chosen = _gathered(routing_map, router.pool_group)  # [world * 32 * 3, experts]
    k = 32 * 3 * world // 4
    assert chosen.sum(dim=0).tolist() == [k] * 4

    # Sample by sample, then along the sequence, is the order in which ties are taken.
    tokens = whole.transpose(0, 1).reshape(-1, 4)
    order = tokens.sort(dim=0, descending=True, stable=True).indices[:k]
    expected = torch.zeros_like(tokens, dtype=torch.bool).scatter_(0, order, True)
    expected = expected.view(3 * world, 32, 4)[3 * rank : 3 * rank + 3].transpose(0, 1)
    assert torch.equal(routing_map, expected.reshape(-1, 4))
    local = whole[:, 3 * rank : 3 * rank + 3].reshape(-1, 4)
    torch.testing.assert_close(probs, torch.sigmoid(local) * routing_map)


@pytest.mark.parametrize("kind", ["normal", "tied", "constant"])
def test_expert_choice_takes_exactly_the_k_largest_of_all_ranks(kind: str) -> None:
    run_ranks(expert_choice_on_ranks, 2, kind)


# The MoE layer


def dense_reference(layer, x: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor):
    """Return every expert on every token, weighted by gate and mask, plus the shared expert."""
    gates = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda r: torch.softmax(r, dim=-1),
        "relu": torch.relu,
    }
    gate = gates[layer.config.et_gate](logits) * chosen
    output = layer.shared_experts(x)
    for index, expert in enumerate(layer.experts.local_experts):
        hidden = torch.relu(x @ expert.linear_fc1.weight.T).square()
        output = output + gate[..., index : index + 1] * (hidden @ expert.linear_fc2.weight.T)
    return output


def layer_against_reference() -> None:
    _, config, model = megatron.start("--moe-router-topk", "2")
    router, layer = _router_and_layer(model)
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(2))
    for gate in ("sigmoid", "softmax", "relu"):
        config.et_gate = layer.config.et_gate = gate
        from megatron_ext.moe.threshold_router import GATES

        router.gate = GATES[gate]
        for thresholds in (
            torch.zeros(4),
            torch.tensor([9.0, -9.0, 0.1, 9.0]),
            torch.full((4,), 9.0),
        ):
            layer.eval()  # by thresholds alone: some experts get all tokens, some tokens no expert
            _set_thresholds(router, thresholds)
            results = []
            for forward in (lambda x: layer(x)[0], None):
                layer.zero_grad()
                inputs = x.clone().requires_grad_()
                if forward is None:
                    logits = inputs @ router.weight.T
                    output = dense_reference(layer, inputs, logits, logits > thresholds)
                else:
                    output = forward(inputs)
                (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
                grads = {name: p.grad for name, p in layer.named_parameters()}
                results.append((output.detach(), inputs.grad, grads))
            (y, dx, grads), (y_ref, dx_ref, grads_ref) = results
            torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(dx, dx_ref, rtol=1e-4, atol=1e-5)
            for name, grad in grads.items():
                expected = grads_ref[name]
                if grad is None:  # an expert without tokens
                    assert expected is None or not expected.any()
                else:
                    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_moe_layer_and_its_gradients_equal_a_dense_mixture() -> None:
    run_ranks(layer_against_reference, 1)


def outputs_and_gradients(dispatcher: str, router_type: str) -> dict[str, torch.Tensor]:
    _, _, model = megatron.start(
        "--expert-model-parallel-size", str(dist.get_world_size()),
        "--moe-token-dispatcher-type", dispatcher, "--router-type", router_type,
    )  # fmt: skip
    router, layer = _router_and_layer(model)
    _set_thresholds(router, torch.tensor([0.1, 3.0, -0.1, 0.0]))
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    x.requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    grads = {f"{dist.get_rank()}/{n}": p.grad for n, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **{n: g for n, g in grads.items() if g is not None}}


@pytest.mark.parametrize("router_type", ["expert-threshold", "expert-choice"])
def test_allgather_dispatcher_equals_alltoall(router_type: str) -> None:
    alltoall = run_ranks(outputs_and_gradients, 2, "alltoall", router_type)
    allgather = run_ranks(outputs_and_gradients, 2, "allgather", router_type)
    for one, other in zip(alltoall, allgather):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


# Selection does not depend on the batch


def causality() -> None:
    _, _, model = megatron.start("--et-capacity", "none")
    router, _ = _router_and_layer(model)
    _set_thresholds(router, torch.tensor([0.05, -0.05, 0.1, 0.0]))
    gpt = model[0].eval()
    maps: list[torch.Tensor] = []
    router.register_forward_hook(lambda m, i, out: maps.append(out[1].view(32, -1, 4)))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 127, (4, 32), generator=generator)
    positions = torch.arange(32).expand(4, 32)

    def run(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps.clear()
        with torch.no_grad():
            logits = gpt(tokens, positions[: len(tokens)], None)
        return logits, maps[0].transpose(0, 1)  # [batch, sequence, ...]

    logits, routing = run(tokens)
    assert 0 < routing.float().mean() < 1
    # Later tokens replaced, the other rows replaced, permuted, or gone.
    later = tokens.clone()
    later[:, 20:] = torch.randint(0, 127, (4, 12), generator=generator)
    others = torch.randint(0, 127, (4, 32), generator=generator)
    others[0] = tokens[0]
    permutation = torch.tensor([2, 0, 3, 1])
    for changed, rows, length in (
        (later, slice(None), 20),
        (others, slice(0, 1), 32),
        (tokens[:1], slice(0, 1), 32),
    ):
        new_logits, new_routing = run(changed)
        assert torch.equal(new_routing[rows, :length], routing[rows, :length])
        torch.testing.assert_close(
            new_logits[rows, :length], logits[rows, :length], rtol=1e-5, atol=1e-5
        )
    new_logits, new_routing = run(tokens[permutation])
    assert torch.equal(new_routing, routing[permutation])
    torch.testing.assert_close(new_logits, logits[permutation], rtol=1e-5, atol=1e-5)


def test_routing_of_a_token_ignores_later_tokens_and_the_rest_of_the_batch() -> None:
    run_ranks(causality, 1)


# The end of the step


def step_on_ranks(pool: str) -> tuple[torch.Tensor, dict]:
    _, _, model = megatron.start("--et-cutoff-pool", pool, "--expert-model-parallel-size", "2")
    from megatron_ext.moe.router import routers_of
    from megatron_ext.training.step import RoutingStep

    router, _ = _router_and_layer(model)
    step = RoutingStep()
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(7)
    expected = torch.zeros(4)
    for update in range(4):  # two in warm-up, two by thresholds
        whole = torch.randn(3, 32, 2 * world, 4, generator=generator)  # three micro-batches
        part = whole[:, :, 2 * rank : 2 * rank + 2]
        for micro_batch in part:
            router.routing(micro_batch)
            with torch.no_grad():  # recomputation and evaluation must not count
                router.routing(micro_batch + 5)
            router.eval()
            if router.thresholds.update_count:
                router.routing(micro_batch + 5)
            router.train()
        before = router.thresholds.average.clone()
        step.resolve(routers_of(model))
        assert torch.equal(router.thresholds.average, before)  # not before the optimizer's step
        if update == 1:  # the optimizer skipped the step: no state changes
            step.discard()
            step.commit()
            assert torch.equal(router.thresholds.average, before)
            continue
        step.commit()
        pools = whole.view(3, -1, 4) if pool == "microbatch" else whole.view(1, -1, 4)
        k = pools.shape[1] // 4
        cutoffs = torch.stack([p.sort(dim=0, descending=True).values[k - 1] for p in pools])
        expected = 0.5 * expected + 0.5 * cutoffs.mean(dim=0)
        torch.testing.assert_close(router.thresholds.average, expected, rtol=1e-6, atol=1e-6)
        figures = step.metrics[1]
        assert sum(figures["fan_out_histogram"]) == 3 * 32 * 2 * world
    return router.thresholds.value(), copy.deepcopy(step.metrics)


@pytest.mark.parametrize("pool", ["microbatch", "step"])
def test_commit_moves_thresholds_once_by_the_cutoffs_of_all_ranks(pool: str) -> None:
    first, second = run_ranks(step_on_ranks, 2, pool)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def communication(pool: str) -> list[tuple[int, int, int]]:
    """Return collectives of the forward pass and the end of six steps, and the stored logits."""
    _, _, model = megatron.start(
        "--num-layers", "5", "--moe-layer-freq", "[0,1,1,1,1]", "--et-cutoff-pool", pool
    )  # fmt: skip
    from megatron_ext.moe.router import routers_of
    from megatron_ext.moe.threshold_router import threshold_routers
    from megatron_ext.training.step import RoutingStep

    routers, step, used = threshold_routers(routers_of(model)), RoutingStep(), []
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(6):
        with counted_collectives() as forward:
            for _ in range(3):
                for router in routers:
                    router.routing(torch.randn(32, 4, 4, generator=generator))
        buffered = max(len(router.cutoffs.buffered_logits) for router in routers)
        with counted_collectives() as end:
            step.resolve(routers)
        step.commit()
        used.append((len(forward.calls), len(end.calls), buffered))
    return used


@pytest.mark.parametrize("pool", ["microbatch", "step"])
def test_thresholds_need_no_collective_in_forward_and_four_per_step(pool: str) -> None:
    warm_up, by_threshold = 2, 4
    for used in run_ranks(communication, 2, pool):
        forward, end, buffered = zip(*used)
        assert min(forward[:warm_up]) > 0
        assert forward[warm_up:] == (0,) * by_threshold
        assert max(end) <= 4
        assert buffered[warm_up:] == (3,) * by_threshold


def thresholds_with_bound(mebibytes: str) -> tuple[torch.Tensor, int, int]:
    _, _, model = megatron.start("--et-logit-buffer-mb", mebibytes)
    from megatron_ext.moe.router import routers_of
    from megatron_ext.training.step import RoutingStep

    router, _ = _router_and_layer(model)
    step, most, calls = RoutingStep(), 0, 0
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        for _ in range(5):
            with counted_collectives() as forward:
                router.routing(torch.randn(32, 2, 4, generator=generator))
            calls = len(forward.calls)
            most = max(most, sum(logits.nbytes for logits in router.cutoffs.buffered_logits))
        step.resolve(routers_of(model))
        step.commit()
    return router.thresholds.value(), most, calls


def test_bound_on_buffered_logits_holds_and_changes_no_threshold() -> None:
    micro_batch = 32 * 2 * 4 * 4  # bytes
    whole = run_ranks(thresholds_with_bound, 2, "1")
    assert [(most, calls) for _, most, calls in whole] == [(5 * micro_batch, 0)] * 2
    for pools in (2, 1, 0):  # one is stored even if none fits
        bounded = run_ranks(thresholds_with_bound, 2, str(pools * micro_batch / 2**20))
        for (expected, _, _), (value, most, calls) in zip(whole, bounded):
            assert torch.equal(value, expected)
            assert most == max(pools, 1) * micro_batch
            assert calls > 0


def counting() -> None:
    _, _, model = megatron.start("--et-capacity", "0.5")
    from megatron_ext.moe.router import routers_of
    from megatron_ext.training.step import RoutingStep

    router, _ = _router_and_layer(model)
    _set_thresholds(router, torch.tensor([-9.0, 9.0, 0.0, 0.6]))
    logits = torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(5))
    _, routing_map = router.routing(logits)
    step = RoutingStep()
    step.resolve(routers_of(model))
    figures, k = step.metrics[1], 64 // 4
    above = (logits.view(-1, 4) > router.thresholds.value()).sum(dim=0)
    assert above[0] == 64
    assert above[1] == 0
    assert routing_map.sum(dim=0)[:2].tolist() == [k * 3 // 2, k // 2]
    bounds = above.clamp(k // 2, k * 3 // 2)
    assert routing_map.sum(dim=0).tolist() == bounds.tolist()
    fan_out = routing_map.sum(dim=1)
    assert figures["fan_out"] == pytest.approx(float(fan_out.float().mean()))
    assert figures["no_expert_share"] == pytest.approx(float((fan_out == 0).float().mean()))
    assert figures["raw_usage"] == pytest.approx(float(above.sum()) / 256)
    dropped, forced = (above - bounds).clamp(min=0).sum(), (bounds - above).clamp(min=0).sum()
    assert figures["saturation"] == pytest.approx(float(dropped) / float(above.sum()))
    assert figures["starvation"] == pytest.approx(float(forced) / (4 * k // 2))
    load = bounds / 64
    assert figures["experts/load"] == pytest.approx(load.tolist())
    assert figures["load_max_over_mean"] == pytest.approx(float(load.max() / load.mean()))
    assert figures["dead_experts"] == 0


def test_routing_metrics_count_what_capacity_dropped_and_forced() -> None:
    run_ranks(counting, 1)


def padding() -> None:
    megatron_args = ("--router-type", "expert-choice")
    _, _, model = megatron.start(*megatron_args)
    router, _ = _router_and_layer(model)
    logits = torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(6))
    mask = torch.zeros(32, 2, dtype=torch.bool)
    mask[24:, 1] = True
    logits[mask] = 99.0  # would win every place
    _, routing_map = router.routing(logits, mask)
    assert not routing_map[mask.view(-1)].any()
    assert routing_map.sum(dim=0).tolist() == [56 // 4] * 4


def test_router_neither_routes_nor_counts_padding() -> None:
    run_ranks(padding, 1)


# Token choice without a loss, where Megatron 0.19.2 has an error


def bias_counts() -> None:
    _, _, model = megatron.start(
        "--router-type", "token-choice", "--moe-router-load-balancing-type", "none", "--bf16",
        "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias",
    )  # fmt: skip
    router = model[0].module.decoder.layers[-1].mlp.router
    hidden = torch.randn(32, 40, 32, generator=torch.Generator().manual_seed(8)).bfloat16()
    mask = torch.zeros(32, 40, dtype=torch.bool)
    mask[30:, ::2] = True
    expected = torch.zeros(4)
    for _ in range(3):  # counts above 256, where bf16 has even numbers only
        _, routing_map = router(hidden, mask)
        expected += routing_map[~mask.reshape(-1)].sum(dim=0)
    assert router.local_tokens_per_expert.dtype == torch.float32
    assert expected.max() > 512
    assert torch.equal(router.local_tokens_per_expert, expected)


def test_loss_free_balancing_counts_every_token_once_and_no_padding() -> None:
    run_ranks(bias_counts, 1)
