"""Tests of engines on every layout: log-probabilities, losses and weights equal those of torch.

Each layout starts its ranks once; `engine_runs.observe` looks at everything there.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import LossSums
from megatron_ext.checkpoint import TRACKER
from tests.alignment.engines.engine_runs import (
    OPTIMIZATION,
    TOLERANCE,
    brute_force,
    error_message_of,
    observe,
    saved,
    share,
    train,
)
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.hf.models import make


def make_expert_threshold(folder, **changes):
    """Write a model with thresholds, with no parameter at 0 or 1."""
    from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, Router
    from megatron_ext.moe.thresholds import Thresholds

    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "norm_scale": True,
        "moe_layers": [0, 1],
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    }
    config = ExpertThresholdConfig(**settings | changes)
    model = ExpertThresholdForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
    for router in (m for m in model.modules() if isinstance(m, Router)):
        thresholds = Thresholds(4, config.threshold_ema_decay)
        thresholds.update(torch.randn(4))
        router.threshold_average.copy_(thresholds.average)
        router.threshold_updates.copy_(thresholds.updates)
        router.thresholds.copy_(thresholds.value())
    model.save_pretrained(folder)


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6, "linear_value_head_dim": 5,
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "llama": partial(make, "llama", vocab_size=128, num_hidden_layers=2),
    "mixtral": partial(make, "mixtral", vocab_size=128, num_hidden_layers=2),
    "expert_threshold": make_expert_threshold,
    "hybrid": partial(make_expert_threshold, **HYBRID),
}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """Return a folder, and the results of plain torch for it."""
    folder = tmp_path_factory.mktemp("model")
    MODELS[request.param](folder)
    return request.param, folder, brute_force(folder)


def on_megatron(folder, checkpoint, layout, packed):
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from tests.alignment.engines.engine_runs import OPTIMIZATION

    engine = MegatronEngine(folder, OPTIMIZATION, MegatronLayout(**layout))
    return observe(engine, folder, checkpoint, packed)


def resume_training(checkpoint, layout):
    """Resume on another layout than the checkpoint's, from the middle of the training."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from tests.alignment.engines.engine_runs import OPTIMIZATION, STEPS, train

    engine = MegatronEngine(checkpoint, OPTIMIZATION, MegatronLayout(**layout))
    first = dict(engine.parameters())
    engine.load(checkpoint)
    again = dict(engine.parameters())
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    return train(engine, range(engine.step, STEPS))


def on_deepspeed(folder, checkpoint, each):
    from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings
    from tests.alignment.engines.engine_runs import OPTIMIZATION

    results: dict = {}
    for name, zero in each.items():
        engine = DeepSpeedEngine(folder, OPTIMIZATION, ZeroSettings(**zero))
        results[name] = observe(engine, folder, checkpoint / name)
    return results


def check(reference, folder, ranks):
    """Compare the results of all ranks of an engine with plain torch; return their samples."""
    observed: dict[str, dict] = {
        name: {tokens: row for rank in ranks for tokens, row in getattr(rank, name).items()}
        for name in ("alone", "packed", "again", "values")
    }
    for tokens, (log_probs, entropies) in reference.scores.items():
        assert observed["alone"][tokens][0] == pytest.approx(log_probs, abs=TOLERANCE)
        assert observed["alone"][tokens][1] == pytest.approx(entropies, abs=TOLERANCE)
        assert observed["values"][tokens] == pytest.approx(reference.values[tokens], abs=TOLERANCE)
        for name in ("packed", "again"):
            alone = observed["alone"][tokens][0]
            assert observed[name][tokens][0] == pytest.approx(alone, abs=rounding(alone, 1e-5))
    assert all(values.keys() == reference.scores.keys() for values in observed.values())
    after = {tokens: row for rank in ranks for tokens, row in rank.after.items()}
    assert after.keys() == reference.after.keys()
    for tokens, log_probs in after.items():
        assert log_probs == pytest.approx(reference.after[tokens], abs=TOLERANCE)
    files = saved(folder)
    samples: dict = {}
    for rank in ranks:
        losses, norms, rates = zip(*rank.steps)
        assert losses == pytest.approx(reference.losses, abs=TOLERANCE)
        assert norms == pytest.approx(reference.norms, rel=1e-3)
        assert rates[:3] == pytest.approx((0, 1e-3, 2e-3)) and rates[-1] == pytest.approx(2.5e-4)
        assert rank.resumed[0] == rank.resumed[1]  # equal in every bit
        assert rank.first.keys() == rank.last.keys() == files.keys()
        for name, tensor in files.items():
            assert torch.equal(rank.first[name].cpu(), tensor), name
            if "threshold" in name:
                assert torch.equal(rank.last[name].cpu(), tensor), name
            elif name in reference.weights:
                moved = (reference.weights[name] - tensor).abs().mean()
                error = (reference.weights[name] - rank.last[name].cpu()).abs().mean()
                assert error < 1e-2 * moved, name
        for prompt, tokens, log_probs, scored in rank.generated:
            assert len(tokens) == 7
            assert log_probs == pytest.approx(scored, abs=TOLERANCE)
            assert samples.setdefault(prompt, tokens) == tokens
    return samples


LAYOUTS = {
    "llama": [
        (1, {"micro_batch": 3}, False),
        (2, {"micro_batch": 2, "shard_optimizer": True}, False),
        (2, {"tensor": 2}, True),
        (2, {"pipeline": 2, "micro_batch": 2}, False),
        (2, {"context": 2}, True),
    ],
    "mixtral": [(2, {"expert": 2}, True)],
    "expert_threshold": [
        (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}, True),
        (2, {"pipeline": 2, "micro_batch": 2}, True),
    ],
    "hybrid": [
        (1, {"micro_batch": 2}, False),
        (2, {"expert": 2}, True),
        (2, {"pipeline": 2, "micro_batch": 2}, True),
    ],
}
ZERO = {
    "llama": {
        "1": {"stage": 1, "micro_batch": 2},
        "2": {"stage": 2, "offload_optimizer": True},
        "3": {"stage": 3, "micro_batch": 2},
    },
    "mixtral": {"3": {"stage": 3}},
    "expert_threshold": {"2": {"stage": 2}},
    "hybrid": {},  # several samples per row are refused
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_engines_match_plain_torch_on_every_layout(model, tmp_path):
    name, folder, reference = model
    all_samples = []
    for number, (ranks, layout, packed) in enumerate(LAYOUTS[name]):
        place = tmp_path / str(number)
        all_samples.append(
            check(reference, folder, run_ranks(on_megatron, ranks, folder, place, layout, packed))
        )
    if name == "llama":
        for steps in run_ranks(resume_training, 2, tmp_path / "2", {"shard_optimizer": True}):
            losses = [loss for loss, _, _ in steps]
            assert losses == pytest.approx(reference.losses[-len(losses) :], abs=TOLERANCE)
    zero = ZERO[name]
    facts = run_ranks(on_deepspeed, 2, folder, tmp_path / "zero", zero) if zero else []
    for stage in zero:
        all_samples.append(check(reference, folder, [rank[stage] for rank in facts]))
    # The same seeds give the same samples everywhere.
    assert all(tokens == all_samples[0] for tokens in all_samples)


def test_packed_batch_has_every_token_in_its_place():
    samples = [
        TokenSample(range(10, 10 + length), prompt, {"x": range(length)})
        for length, prompt in ((4, 1), (7, 3), (2, 2), (3, 1))
    ]
    batch = TokenBatch.packed(samples, 8)
    assert batch.rows == 3 and batch.is_packed and not TokenBatch.of(samples).is_packed
    results: dict = {}
    for row in range(batch.rows):
        for number in range(int(batch.samples[row].max()) + 1):
            at = batch.samples[row] == number
            length = int(at.sum())
            assert batch.positions[row, at].tolist() == list(range(length))
            assert batch.extras["x"][row, at].tolist() == list(range(length))
            assert batch.predicted[row, at].tolist() == [False] + [True] * (length - 1)
            results[length] = int(batch.loss_mask[row, at].sum())
    assert results == {4: 3, 7: 4, 2: 0, 3: 2}
    assert batch.sum_by_sample(batch.extras["x"]).sort().values.tolist() == [1.0, 3.0, 6.0, 21.0]
    padded = batch.padded(5, 11)
    assert torch.equal(padded.slice(slice(0, 3)).tokens[:, :8], batch.tokens)
    assert not padded.loss_mask[3:].any() and not padded.predicted[:, 8:].any()


def test_packed_batch_refuses_a_sample_that_is_too_long_or_has_no_prompt():
    with pytest.raises(ValueError, match="does not fit a row of 3"):
        TokenBatch.packed([TokenSample([1, 2, 3, 4])], 3)
    with pytest.raises(ValueError, match="0 prompt tokens"):
        TokenSample([1, 2], 0)


def first_ratios(engine):
    """Return the largest difference, in nats, of a train step and scoring before an update."""
    batch = share(engine, 0)
    observed: list[torch.Tensor] = []
    before = engine.log_probs(batch, trained_only=True).log_probs

    def loss(scores, part):
        observed.append(
            scores.log_probs.detach() - before[len(observed) : len(observed) + part.rows]
        )
        return LossSums(scores.log_probs.sum(), part.loss_mask.sum())

    engine.train_step(batch, loss)
    return max(float(difference.abs().max()) for difference in observed)


def make_with_dropout(folder):
    """Write models with high dropout rates of modules, of functions, and of whole layers."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    size = {"vocab_size": 128, "max_position_embeddings": 64, "hidden_size": 32}
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    gpt = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4, **rates)
    GPT2LMHeadModel(gpt).save_pretrained(folder / "gpt2")
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    opt = OPTConfig(
        **size,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **rates,
    )
    OPTForCausalLM(opt).save_pretrained(folder / "opt")
    make("llama", folder / "llama", vocab_size=128, num_hidden_layers=2, attention_dropout=0.5)


def ratios_of_deepspeed(folder):
    from alignment.engines.deepspeed import DeepSpeedEngine

    return {
        name: first_ratios(DeepSpeedEngine(folder / name, OPTIMIZATION))
        for name in ("gpt2", "opt", "llama")
    }


def ratios_of_megatron(folder):
    from alignment.engines.megatron import MegatronEngine

    engine = MegatronEngine(folder, OPTIMIZATION)
    assert engine.config.hidden_dropout == engine.config.attention_dropout == 0
    return first_ratios(engine)


@pytest.mark.slow
def test_engines_turn_dropout_off(tmp_path):
    make_with_dropout(tmp_path)
    [results] = run_ranks(ratios_of_deepspeed, 1, tmp_path)
    assert all(ratio < 1e-5 for ratio in results.values()), results
    make("llama", tmp_path / "plain", vocab_size=128, num_hidden_layers=2)
    [ratio] = run_ranks(ratios_of_megatron, 1, tmp_path / "plain")
    assert ratio < 1e-5


def load_what_a_kill_left(folder, place):
    """Return the messages of ranks for an empty tracker, with and without a damaged file."""
    import torch.distributed as dist

    from alignment.engines.megatron import MegatronEngine, MegatronLayout

    engine = MegatronEngine(folder, OPTIMIZATION, MegatronLayout())

    def leave(change):
        if dist.get_rank() == 0:
            change()
        dist.barrier()

    train(engine, [0])
    engine.save(place)
    train(engine, [1])
    leave(lambda: (place / TRACKER).write_text(""))
    engine.load(place)
    repaired = engine.step
    # Ranks read every other file: this one is the second's.
    checkpoint = place / "iter_0000001"
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "integrity.json")
    leave(lambda: (checkpoint / names[1]).write_bytes(b"damaged"))
    damaged = error_message_of(lambda: engine.load(place))
    leave(lambda: (checkpoint / "integrity.json").unlink())
    leave(lambda: (place / TRACKER).write_text(""))
    return repaired, names[1], damaged, error_message_of(lambda: engine.load(place))


@pytest.mark.slow
def test_megatron_load_repairs_the_tracker_or_raises_on_all_ranks(tmp_path):
    make("llama", tmp_path / "model", vocab_size=128, num_hidden_layers=1)
    place = tmp_path / "checkpoints"
    first, second = run_ranks(load_what_a_kill_left, 2, tmp_path / "model", place)
    assert first == second
    repaired, name, damaged, nothing = first
    assert repaired == 1
    assert damaged.endswith(
        f"is incomplete or damaged: its file {name} differs from what was saved"
    )
    assert f"{place / TRACKER} is damaged and no checkpoint in that folder is intact" in nothing


def dtypes_on_a_gpu(folder):
    """Return Megatron's data types for a trained model, an untrained one, and a chosen one."""
    from unittest import mock

    from alignment.engines import megatron

    class Started(Exception):
        pass

    results = []
    for optimization, dtype in ((OPTIMIZATION, None), (None, None), (OPTIMIZATION, torch.float32)):
        with (
            mock.patch.object(megatron, "is_cpu_device", return_value=False),
            mock.patch.object(megatron, "start", side_effect=Started) as start,
            pytest.raises(Started),
        ):
            megatron.MegatronEngine(folder, optimization, dtype=dtype)
        results.append(start.call_args.args[3])
    return results


@pytest.mark.slow
def test_megatron_engine_trains_an_fp16_model_in_bf16(tmp_path):
    model = make("llama", tmp_path / "fp32", vocab_size=128, num_hidden_layers=1)
    model.half().save_pretrained(tmp_path / "fp16")
    [results] = run_ranks(dtypes_on_a_gpu, 1, tmp_path / "fp16")
    assert results == [torch.bfloat16, None, torch.float32]


def train_in_fp16(folder):
    """Return, on a rank, steps from a loss scale that overflows, and whether weights changed."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from tests.alignment.engines.engine_runs import OPTIMIZATION, by_token, share

    scale = ["--initial-loss-scale", str(2.0**24), "--hysteresis", "1", "--min-loss-scale", "1"]
    engine = MegatronEngine(
        folder, OPTIMIZATION, MegatronLayout(micro_batch=3), dtype=torch.float16, flags=scale
    )
    results = []
    for _ in range(20):
        before = {name: tensor.clone() for name, tensor in engine.parameters()}
        result = engine.train_step(share(engine, 0), by_token)
        moved = any(not torch.equal(before[name], tensor) for name, tensor in engine.parameters())
        results.append((result, engine.step, moved))
    return results


@pytest.mark.slow
def test_train_step_with_fp16_overflow_is_skipped_and_not_counted(tmp_path):
    make("llama", tmp_path, vocab_size=128, num_hidden_layers=1)
    [results] = run_ranks(train_in_fp16, 1, tmp_path)
    overflows = [result.grad_norm is None for result, _, _ in results]
    assert overflows[0] and not overflows[-1]
    steps = 0
    for (result, step, moved), overflow in zip(results, overflows):
        assert result.lr == OPTIMIZATION.rate(steps)  # the schedule did not move either
        steps += not overflow
        assert step == steps and (overflow or math.isfinite(result.grad_norm))
        assert moved == (not overflow and result.lr > 0)


def refusal_with(folder, flags):
    from alignment.engines.megatron import MegatronEngine, MegatronLayout

    return error_message_of(
        lambda: MegatronEngine(folder, OPTIMIZATION, MegatronLayout(), flags=flags)
    )


def test_megatron_engine_refuses_flags_that_change_the_model(tmp_path):
    make("llama", tmp_path / "model", vocab_size=128, num_hidden_layers=1)
    for flags, name in (
        (["--norm-epsilon", "0.1"], "eps = 0.1, which was trained with"),
        (["--rotary-percent", "0.5"], "rotary_percent = 0.5"),
    ):
        [refusal] = run_ranks(refusal_with, 1, tmp_path / "model", flags)
        assert name in refusal


def halving(step, optimization):
    return optimization.lr * 0.5**step


def rates_of_a_schedule(folder, place):
    from dataclasses import replace

    from alignment.engines.deepspeed import DeepSpeedEngine
    from alignment.engines.megatron import MegatronEngine
    from tests.alignment.engines.engine_runs import OPTIMIZATION, by_token, share

    results = []
    for kind in (MegatronEngine, DeepSpeedEngine):
        engine: Any = kind(folder, replace(OPTIMIZATION, schedule=halving))
        rates = [engine.train_step(share(engine, 0), by_token).lr for _ in range(2)]
        engine.save(place / kind.__name__)
        rates.append(engine.train_step(share(engine, 0), by_token).lr)
        engine.load(place / kind.__name__)
        results.append([*rates, engine.train_step(share(engine, 0), by_token).lr])
    return results


@pytest.mark.slow
def test_schedule_by_function_sets_the_rate_of_every_step_also_after_a_load(tmp_path):
    make("llama", tmp_path / "model", vocab_size=128, num_hidden_layers=1)
    [results] = run_ranks(rates_of_a_schedule, 1, tmp_path / "model", tmp_path)
    expected = [OPTIMIZATION.lr * factor for factor in (1, 0.5, 0.25, 0.25)]
    assert results == [pytest.approx(expected)] * 2
