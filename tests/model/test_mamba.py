"""Tests of Mamba-2 layers against their recurrence, and of sizes that are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import UserError
from tests import megatron
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.megatron import DELTA_NET, MAMBA
from tests.model.test_gated_delta_net import TP2, refusals


def by_definition(mixer: Any, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return the output of a layer, token by token, for one sample `[tokens, hidden]`."""
    tokens, heads, size = len(hidden), mixer.nheads, mixer.headdim
    groups, states = mixer.ngroups, mixer.d_state
    sizes = (heads * size, heads * size + 2 * groups * states, heads)
    z, mixed, dt = (hidden @ weights["in_proj.weight"].T).split(sizes, dim=-1)
    kernel, outputs = weights["conv1d_weight"][:, 0], []
    state: dict[int, Tensor] = {}
    for t in range(tokens):
        channels = weights["conv1d_bias"]
        for back in range(min(4, t + 1)):
            channels = channels + kernel[:, 3 - back] * mixed[t - back]
        x, b, c = F.silu(channels).split((heads * size, groups * states, groups * states))
        parts = []
        for head in range(heads):
            group = head // (heads // groups)
            of_group = slice(group * states, (group + 1) * states)
            of_head = slice(head * size, (head + 1) * size)
            step = F.softplus(dt[t, head] + weights["dt_bias"][head])
            decay = (-weights["A_log"][head].exp() * step).exp()
            update = step * torch.outer(x[of_head], b[of_group])
            state[head] = update if t == 0 else decay * state[head] + update
            parts.append(state[head] @ c[of_group] + weights["D"][head] * x[of_head])
        gated = (torch.cat(parts) * F.silu(z[t])).view(groups, -1)
        normalized = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        outputs.append(normalized.flatten() * weights["norm.weight"])
    return torch.stack(outputs) @ weights["out_proj.weight"].T


def layer_and_its_definition() -> None:
    """On a rank: the layer has the outputs and gradients of its recurrence in fp64."""
    _, _, [model] = megatron.start("--hybrid-layer-pattern", "M-ME", *MAMBA)
    mixer = model.decoder.layers[0].self_attention
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (mixer.in_proj.weight, mixer.norm.weight, mixer.D):
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
        mixer.dt_bias.add_(1)
    tokens = 70  # more than one chunk
    hidden = torch.randn(tokens, 2, 32, generator=random)
    factors = torch.randn(tokens, 2, 32, generator=random)
    output, bias = mixer(hidden)
    assert bias is None
    (output * factors).sum().backward()
    weights = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    expected = torch.stack(
        [by_definition(mixer, hidden[:, row].double(), weights) for row in range(2)], dim=1
    )
    (expected * factors).sum().backward()
    close = rounding(expected, 1e-5)
    torch.testing.assert_close(output.double(), expected, atol=close, rtol=0)
    for name, parameter in mixer.named_parameters():
        close = rounding(weights[name].grad, 1e-5)
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, atol=close, rtol=0, msg=name
        )
    # The last output also depends on tokens before those of the convolution.
    shorter, _ = mixer(hidden[-5:])
    assert (shorter[-1] - output[-1]).abs().max() > 1e-2


def test_layer_equals_its_recurrence() -> None:
    run_ranks(layer_and_its_definition, 1)


def flops_and_products() -> tuple[float, float]:
    """Return, on a rank, the FLOPs of a sequence, and those of its products with parameters."""
    from megatron_ext.flops import training_flops

    # As many channels as Megatron's formula assumes: twice the hidden size.
    args, _, [model] = megatron.start(
        "--hybrid-layer-pattern", "M-ME", *MAMBA, "--mamba-head-dim", "8"
    )
    products = sum(
        p.numel() / (4 if "local_experts" in name else 1)  # one of four experts
        for name, p in model.named_parameters()
        if p.dim() == 2 and not name.startswith("embedding") and "router" not in name
    )
    return training_flops(args, 1), 6 * 32 * products


def test_flops_are_those_of_the_products_and_of_the_scan() -> None:
    [(flops, products)] = run_ranks(flops_and_products, 1)
    scan = 3 * 2 * 7 * 32 * 64 * 6  # of two layers, by Megatron's estimate
    assert flops == pytest.approx(products + scan, rel=1e-3)


def refusal_of_conversion() -> str:
    from megatron_ext.hf.architecture import from_args

    args, *_ = megatron.start(*HYBRID)
    try:
        from_args(args)
    except UserError as error:
        return str(error)
    return ""


def test_mamba_model_is_not_converted() -> None:
    [message] = run_ranks(refusal_of_conversion, 1)
    assert message.startswith("The model has Mamba layers, which no supported Hugging Face family")


HYBRID = ("--hybrid-layer-pattern", "M-ME", *MAMBA)
FIRST = ("--mamba-layers", "1", "0")
CP2 = ("--context-parallel-size", "2")
REFUSED = {
    (*HYBRID, "--mamba-head-dim", "0"): "--mamba-head-dim 0 must be at least 1",
    ("--mamba-layers", "1"): "--mamba-layers 1 must be a 0 or a 1 for each of the 2 layers",
    ("--mamba-layers", "2", "0"): "--mamba-layers 2 0 must be a 0 or a 1",
    (*FIRST, "--experimental-attention-variant", "gated_delta_net", *DELTA_NET,
     "--linear-attention-freq", "[1,0]"): "are Gated DeltaNet layers by --linear-attention-freq",
    (*FIRST, "--mamba-head-dim", "5"): "Twice --hidden-size 32 is not divisible by "
    "--mamba-head-dim 5",
    (*HYBRID, "--mamba-num-groups", "3"): "The 8 heads of a Mamba layer are not divisible by "
    "--mamba-num-groups 3",
    (*HYBRID, *TP2, "--sequence-parallel", "--mamba-num-groups", "1"): "--mamba-num-groups 1 is "
    "not divisible by --tensor-model-parallel-size 2",
    (*HYBRID, *TP2, "--sequence-parallel", *CP2, "--mamba-num-heads", "6"): "The 6 heads of a "
    "Mamba layer are not divisible by --tensor-model-parallel-size 2 times --context-parallel-size "
    "2",
    (*HYBRID, "--context-parallel-size", "4", "--mamba-num-heads", "12", "--mamba-num-groups", "3",
     "--seq-length", "32"): "--mamba-num-groups 3 is neither a multiple nor a divisor",
    (*HYBRID, "--disable-mamba-mem-eff-path"): "--disable-mamba-mem-eff-path is not supported",
    (*HYBRID, "--mamba-training-ssm-states-dtype", "fp32"): "needs the package mamba-ssm",
}  # fmt: skip


@pytest.mark.slow
def test_mamba_sizes_and_layouts_that_do_not_fit_are_refused() -> None:
    [messages] = run_ranks(refusals, 1, (), list(REFUSED))
    for message, expected in zip(messages, REFUSED.values(), strict=True):
        assert expected in message
