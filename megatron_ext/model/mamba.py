"""Mamba-2 layers (arXiv 2405.21060): Megatron's, also in torch and with this project's cache.

A layer keeps a matrix for each head, to which every token adds the product of its input and a key
after a decay, and which it reads by a query. The paper calls keys B and queries C; the heads of a
group share them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_ext import patches
from megatron_ext.devices import is_cpu_device
from megatron_ext.model.recurrent import RecurrentLayer

# Tokens of a chunk in torch. Autograd saves a multiple of its square, and a state, for each chunk.
_CHUNK = 64
_MIXER = "megatron.core.ssm.mamba_mixer"


class CachedMambaMixer(RecurrentLayer, MambaMixer):
    """Megatron's layer; in inference, for tokens of many rows at different positions.

    In training it calls the kernels of mamba-ssm, or what takes their place; see `replacements`.
    Inference computes in torch on every device.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("cp_comm_type", None)  # of attention
        super().__init__(config, *args, d_model=config.hidden_size, **kwargs)

    def _run(self, hidden: Tensor) -> Any:
        return MambaMixer.forward(self, hidden)

    def _empty_states(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        channels, _, kernel = self.conv1d_weight.shape
        sizes = (1, self.nheads_local_tp, self.headdim, self.d_state)
        return (
            projected.new_zeros(1, channels, kernel - 1),
            projected.new_zeros(sizes, dtype=torch.float32),
        )

    def _advance(
        self, projected: Tensor, window: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, window, state = convolve_and_scan(
            projected,
            self.conv1d_weight.squeeze(1),
            self.conv1d_bias,
            self.dt_bias,
            -self.A_log.float().exp(),
            self.D,
            head_dim=self.headdim,
            groups=self.ngroups_local_tp,
            window=window,
            state=state,
        )
        return self.norm(output).flatten(0, 1), window, state


class GroupRMSNorm(torch.nn.Module):
    """RMSNorm of each group of heads, with a learned scale whatever `--et-norm-scale` is.

    It has the arguments, weights and checkpoints of the norm that Megatron takes from mamba-ssm.
    """

    def __init__(
        self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, **kwargs: Any
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **kwargs))
        self.tp_group: Any = None  # the layer sets it

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x [..., heads * head size]` in fp32, and return it in its dtype."""
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normalized = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normalized * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the scale, which tensor-parallel ranks share as they do the heads."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return state


def convolve_and_scan(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    step_bias: Tensor,
    rate: Tensor,
    skip: Tensor,
    *,
    head_dim: int,
    groups: int,
    window: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what is between the two projections of a layer, without its norm.

    Args:
        projected: Output of the input projection, `[rows, tokens, dimension]`: gates and inputs of
            the heads, keys and queries of the groups, and a step size for each head.
        weight: Weights of the convolution, `[channels, kernel]`.
        bias: Its bias, `[channels]`.
        step_bias: Bias of the step sizes before their softplus, `[heads]`.
        rate: Negative rates of the decay, fp32 `[heads]`.
        skip: Factors by which a head's input is added to its output, `[heads]`.
        head_dim: Size of a head.
        groups: Number of groups of heads that share keys and queries.
        window: Last inputs of the convolution, `[rows, channels, kernel - 1]`. Default: zeros.
        state: See `scan`.

    Returns:
        Gated output `[rows, tokens, heads * head size]`, and the next window and state.
    """
    channels, kernel = weight.shape
    heads = len(step_bias)
    gate, mixed, steps = projected.split((heads * head_dim, channels, heads), dim=-1)
    mixed = mixed.transpose(1, 2)
    inputs = F.pad(mixed, (kernel - 1, 0)) if window is None else torch.cat((window, mixed), dim=-1)
    mixed = F.silu(F.conv1d(inputs, weight.unsqueeze(1), bias, groups=channels)).transpose(1, 2)
    shared = (channels - heads * head_dim) // 2
    values, keys, queries = mixed.float().split((heads * head_dim, shared, shared), dim=-1)
    values = values.unflatten(-1, (heads, head_dim))
    steps = F.softplus(steps.float() + step_bias.float())
    output, state = scan(
        values * steps.unsqueeze(-1),
        steps * rate,
        keys.unflatten(-1, (groups, -1)),
        queries.unflatten(-1, (groups, -1)),
        state,
    )
    output = (output + values * skip.float().unsqueeze(-1)).flatten(-2)
    return (output * F.silu(gate.float())).to(projected.dtype), inputs[..., 1 - kernel :], state


def scan(
    values: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the outputs of the heads, and their state after the last token.

    A head's state is `S <- exp(decay) S + value key^T`, and its output `S query`. Tokens of a chunk
    are computed together, as in section 6 of the paper.

    Args:
        values: Inputs times step sizes, fp32 `[rows, tokens, heads, head size]`.
        decay: Logarithms of the decay, fp32 `[rows, tokens, heads]`.
        keys: fp32 `[rows, tokens, groups, state size]`. Neighboring heads are a group.
        queries: Like `keys`.
        state: fp32 `[rows, heads, head size, state size]`. Default: zeros.

    Returns:
        Output like `values`, and state.
    """
    rows, tokens, heads, head_dim = values.shape
    groups, size = keys.shape[2:]
    length = min(tokens, _CHUNK)

    def chunked(x: Tensor) -> Tensor:
        """Return `[rows, chunks, length, groups, ...]`, padded by tokens that change nothing."""
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, -tokens % length])
        return x.unflatten(1, (-1, length))

    v = chunked(values.unflatten(2, (groups, -1)))  # [rows, chunks, length, groups, heads, head]
    k, q = chunked(keys), chunked(queries)
    total = chunked(decay.unflatten(2, (groups, -1))).cumsum(2)  # since the chunk began
    total = total.permute(0, 1, 3, 4, 2)  # [rows, chunks, groups, heads of a group, length]
    # Within a chunk: token i reads what token j <= i wrote.
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    future = torch.ones(length, length, dtype=torch.bool, device=v.device).triu(1)
    factors = between.masked_fill(future, -torch.inf).exp()
    scores = torch.einsum("rcign,rcjgn->rcgij", q, k).unsqueeze(3) * factors
    output = torch.einsum("rcghij,rcjghp->rcighp", scores, v)
    # Between chunks: the state before each of them.
    remaining = (total[..., -1:] - total).exp()
    written = torch.einsum("rcghj,rcjghp,rcjgn->rcghpn", remaining, v, k)
    whole = total[..., -1].exp()[..., None, None]
    if state is None:
        state = values.new_zeros(rows, heads, head_dim, size)
    state = state.unflatten(1, (groups, -1))
    before = []
    for chunk in range(v.shape[1]):
        before.append(state)
        state = state * whole[:, chunk] + written[:, chunk]
    output = output + torch.einsum(
        "rcign,rcghpn,rcghi->rcighp", q, torch.stack(before, dim=1), total.exp()
    )
    return output.flatten(1, 2)[:, :tokens].flatten(2, 3), state.flatten(1, 2)


def split_conv1d_scan(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    step_bias: Tensor,
    rate: Tensor,
    D: Tensor,
    *,
    headdim: int,
    ngroups: int,
    seq_idx: Tensor | None,
    **_: Any,
) -> Tensor:
    """Compute in torch what the kernel of mamba-ssm does; see `convolve_and_scan`."""
    assert seq_idx is None
    return convolve_and_scan(
        *(projected, weight, bias, step_bias, rate, D), head_dim=headdim, groups=ngroups
    )[0]


def has_kernels() -> bool:
    """Return whether mamba-ssm and causal-conv1d are installed and the device is a GPU."""
    packages = patches.original(f"{_MIXER}.HAVE_MAMBA_SSM") and (
        patches.original(f"{_MIXER}.causal_conv1d_fn") is not None
    )
    return bool(packages) and not is_cpu_device()


def replacements() -> dict[str, Any]:
    """Return what takes the place of the kernels where they cannot run."""
    if has_kernels():
        return {}
    return {
        f"{_MIXER}.HAVE_MAMBA_SSM": True,
        f"{_MIXER}.ExtendedRMSNorm": GroupRMSNorm,
        f"{_MIXER}.mamba_split_conv1d_scan_combined": split_conv1d_scan,
    }
