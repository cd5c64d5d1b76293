"""Tests of the decoder and its initial weights against the paper's model."""

import hashlib
from itertools import batched
from typing import Any

import pytest
import torch

from tests import megatron
from tests.distributed import run_ranks

PAPER = ("--et-init", "paper", "--num-query-groups", "1", "--group-query-attention")


def whole_weights(*flags: str) -> dict[str, str]:
    """Return a digest of every weight by its global name, with tensor-parallel shards joined."""
    _, _, stages = megatron.start(*flags)
    import torch.distributed as dist

    from megatron_ext.model.initialization import global_parameter_name

    digests = {}
    for model in stages:
        groups = model.pg_collection
        for name, parameter in model.named_parameters():
            expert = not getattr(parameter, "allreduce", True)
            group = groups.expt_tp if expert else groups.tp
            value = parameter.detach()
            if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
                parts = [torch.empty_like(value) for _ in range(group.size())]
                dist.all_gather(parts, value.contiguous(), group=group)
                dim, stride = parameter.partition_dim, parameter.partition_stride
                pieces = [part.chunk(stride, dim=dim) for part in parts]
                value = torch.cat([p[s] for s in range(stride) for p in pieces], dim=dim)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                assert not value[127:].any()  # the padding of the vocabulary
                value = value[:127]
            data = value.contiguous().numpy().tobytes()
            digests[global_parameter_name(model, name)] = hashlib.sha256(data).hexdigest()
    return digests


@pytest.mark.parametrize("style", [(), ("--et-init", "paper"), ("--swiglu", "--et-norm-scale")])
def test_initial_weights_depend_on_the_seed_and_not_on_the_layout(style: tuple[str, ...]) -> None:
    if "--swiglu" in style:
        megatron_flags = [f for f in megatron.TINY if f != "--squared-relu"]
        style = (*style, "--no-bias-swiglu-fusion")
    else:
        megatron_flags = megatron.TINY
    [alone] = run_ranks(whole_weights_of, 1, megatron_flags, style)
    for layout in (
        ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        ("--pipeline-model-parallel-size", "2"),
        ("--expert-model-parallel-size", "2"),
    ):
        spread: dict[str, str] = {}
        for digests in run_ranks(whole_weights_of, 2, megatron_flags, (*style, *layout)):
            spread |= digests
        assert spread == alone, layout
    [other] = run_ranks(whole_weights_of, 1, megatron_flags, (*style, "--seed", "7"))
    different = {name for name in alone if alone[name] != other[name]}
    assert any("router" in name for name in different)


def whole_weights_of(base: list[str], flags: tuple[str, ...]) -> dict[str, str]:
    megatron.TINY = base
    return whole_weights(*flags)


def statistics() -> dict[str, tuple[float, list[int]]]:
    wide = ("--hidden-size", "256", "--ffn-hidden-size", "1024", "--moe-ffn-hidden-size", "128")
    _, _, [model] = megatron.start(*PAPER, *wide, "--num-attention-heads", "4")
    from megatron_ext.model.initialization import global_parameter_name

    return {
        global_parameter_name(model, name): (float(p.detach().std()), list(p.shape))
        for name, p in model.named_parameters()
    }


def test_initial_weights_have_the_scales_of_the_paper() -> None:
    [stds] = run_ranks(statistics, 1)
    layer = "decoder.layers.1."
    for name, std in {
        "embedding.word_embeddings.weight": 1.0,
        "output_layer.weight": 0.0,
        layer + "self_attention.linear_proj.weight": 0.0,
        layer + "mlp.experts.2.linear_fc2.weight": 0.0,
        layer + "mlp.shared_experts.linear_fc2.weight": 0.0,
        "decoder.layers.0.mlp.linear_fc2.weight": 0.0,
        layer + "mlp.router.weight": 256**-0.5,
        "decoder.layers.0.mlp.linear_fc1.weight": 256**-0.5,  # wider out than in
        layer + "mlp.experts.2.linear_fc1.weight": 256**-0.5 * (128 / 256) ** 0.5,
    }.items():
        assert stds[name][0] == pytest.approx(std, rel=0.06), name
    # 4 query heads of 64 rows, then a key and a value head, which have fewer outputs than inputs.
    qkv, shape = stds[layer + "self_attention.linear_qkv.weight"]
    assert shape == [6 * 64, 256]
    expected = ((4 * 1.0 + 2 * 64 / 256) / 6) ** 0.5 * 256**-0.5
    assert qkv == pytest.approx(expected, rel=0.06)
    assert not any("norm" in name or name.endswith("bias") for name in stds)


def reference_decoder(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits `[batch, s, vocab]` of the paper's decoder, with the MoE layers of `model`."""
    heads, head_dim = 2, 16

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [batch, s, heads, head_dim]
        half = head_dim // 2
        frequency = 10000 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
        )

    batch, length = tokens.shape
    x = norm(model.embedding.word_embeddings.weight[tokens])
    for attention_layer, layer in batched(model.decoder.layers, 2):
        attention = attention_layer.self_attention
        qkv = norm(x) @ attention.linear_qkv.weight.T
        qkv = qkv.view(batch, length, heads, 3, head_dim)
        q, k, v = (part.squeeze(3) for part in qkv.split(1, dim=3))
        q, k = norm(rotate(q)), norm(rotate(k))  # after the rotation, as the paper says
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        context = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + context @ attention.linear_proj.weight.T
        hidden = norm(x)
        if hasattr(layer.mlp, "router"):
            x = x + layer.mlp(hidden.transpose(0, 1).contiguous())[0].transpose(0, 1)
        else:
            up = torch.relu(hidden @ layer.mlp.linear_fc1.weight.T).square()
            x = x + up @ layer.mlp.linear_fc2.weight.T
    logits = norm(x) @ model.output_layer.weight.T
    return 15 * torch.tanh(logits / 15)


def decoder() -> None:
    _, _, [model] = megatron.start("--init-method-std", "1.0")
    router = model.decoder.layers[-1].mlp.router
    for _ in range(2):
        router.thresholds.update(torch.tensor([0.5, 0.0, -0.5, 1.0]))
    model.eval()
    tokens = torch.randint(0, 127, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens, torch.arange(32).expand(3, 32), None)
        expected = reference_decoder(model, tokens)
    assert (logits[..., 127:] == -torch.inf).all()  # the padding of the vocabulary
    logits, expected = logits[..., :127], expected[..., :127]
    assert 10 < logits.abs().max() <= 15  # the cap is at work
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_decoder_equals_a_plain_implementation_of_the_paper() -> None:
    run_ranks(decoder, 1)


def rotary_frequencies(factor: float) -> torch.Tensor:
    """Return, on a rank, the frequencies that rotate queries and keys."""
    flags = ("--use-rope-scaling", "--rope-scaling-factor", str(factor))
    _, _, [model] = megatron.start(*flags, "--kv-channels", "64")
    return model.rotary_pos_emb.inv_freq.cpu()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_equals_llama_3_for_every_factor(factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": factor,
            "original_max_position_embeddings": 8192,
            **scaling,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    [frequencies] = run_ranks(rotary_frequencies, 1, factor)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


def mean_loss(*flags: str) -> float:
    """Return the loss of the untrained model on some tokens."""
    _, _, [model] = megatron.start(*flags)
    tokens = torch.randint(127, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        return float(model(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean())


@pytest.mark.parametrize("norm", [(), ("--et-norm-scale",)])
def test_residual_stream_may_be_fp32_with_weights_in_bf16(norm: tuple[str, ...]) -> None:
    flags = ("--init-method-std", "0.2", *norm)  # large enough that rounding is visible
    [exact] = run_ranks(mean_loss, 1, *flags)
    [rounded] = run_ranks(mean_loss, 1, *flags, "--bf16")
    [residual] = run_ranks(mean_loss, 1, *flags, "--bf16", "--fp32-residual-connection")
    assert residual == pytest.approx(exact, rel=0.01)
    assert residual != rounded
