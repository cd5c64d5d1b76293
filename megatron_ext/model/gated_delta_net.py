"""Gated DeltaNet layers (arXiv 2412.06464): Megatron's, also with this project's cache.

A layer keeps a matrix for each head, to which every token adds the part of its value that the
matrix does not yet return for its key, after a decay.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import common
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext import patches
from megatron_ext.devices import is_cpu_device
from megatron_ext.model.recurrent import RecurrentLayer

# Tokens of a chunk in torch. Autograd saves a multiple of its square for each chunk; on a CPU
# 32 take half the time of the 64 of Megatron.
_CHUNK = 32
_COMMON = "megatron.core.ssm.gated_delta_net.common"


class CachedGatedDeltaNet(RecurrentLayer, GatedDeltaNet):
    """Megatron's layer; in inference, for tokens of many rows at different positions.

    Its kernels are those of flash-linear-attention; where these cannot run, the layer computes in
    torch as Megatron does in deterministic mode. The activation is SiLU, as in the paper, whatever
    that of the MLPs is.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if not has_kernels():
            config = copy.copy(config)
            config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)
        self.act_fn, self.activation = F.silu, "silu"
        if config.deterministic_mode:
            self.gated_delta_rule = partial(common.torch_chunk_gated_delta_rule, chunk_size=_CHUNK)
        # As Megatron's Mamba layer: sizes of the blocks of rows, each of which is sharded.
        blocks = list(self.in_proj_split_sections)
        self.in_proj.weight.partition_sizes = blocks
        self.conv1d.weight.partition_sizes = blocks[:3]

    def _run(self, hidden: Tensor) -> Any:
        return GatedDeltaNet.forward(self, hidden, None)

    def _empty_states(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        heads, kernel = self.num_v_heads_local_tp, self.conv_kernel_dim
        sizes = (1, heads, self.key_head_dim, self.value_head_dim)
        return (
            projected.new_zeros(1, self.conv_dim_local_tp, kernel - 1),
            projected.new_zeros(sizes, dtype=torch.float32),
        )

    def _advance(
        self, projected: Tensor, window: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, tokens, _ = projected.shape
        qkv, gate, beta, alpha = projected.split(self.feat_dim_split, dim=-1)
        gate = gate.reshape(rows, tokens, -1, self.value_head_dim)
        inputs = torch.cat((window, qkv.transpose(1, 2)), dim=-1)
        mixed = F.conv1d(inputs, self.conv1d.weight, self.conv1d.bias, groups=inputs.shape[1])
        query, key, value, gate, beta, alpha = self._prepare_input_for_gated_delta_rule(
            self.act_fn(mixed).transpose(1, 2), gate, rows, tokens, beta, alpha
        )
        decay, beta = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha, beta)
        if tokens == 1:
            output, state = recurrent_step(query, key, value, decay, beta, state)
        else:
            output, state = self.gated_delta_rule(
                *(query, key, value),
                g=decay,
                beta=beta,
                initial_state=state,
                output_final_state=True,
            )
        normalized = self._apply_gated_norm(output, gate)
        return normalized.reshape(rows * tokens, -1), inputs[..., tokens:], state


def recurrent_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output and the next state of the gated delta rule for one token of each row.

    Args:
        query: Normalized queries, `[rows, 1, heads, key size]`.
        key: Normalized keys, like `query`.
        value: Values, `[rows, 1, heads, value size]`.
        decay: Logarithm of the factor of the state, `[rows, 1, heads]`.
        beta: Share of the error that is corrected, `[rows, 1, heads]`.
        state: fp32 `[rows, heads, key size, value size]`.

    Returns:
        Output like `value`, and state.
    """
    q, k, v = (x.squeeze(1).float() for x in (query, key, value))
    state = state * decay.squeeze(1).float().exp()[..., None, None]
    error = v - torch.einsum("rhk,rhkv->rhv", k, state)
    state = state + torch.einsum("rhk,rhv->rhkv", k, error * beta.squeeze(1).float()[..., None])
    output = torch.einsum("rhk,rhkv->rhv", q, state) * q.shape[-1] ** -0.5
    return output.to(value.dtype).unsqueeze(1), state


def normalize(x: Tensor, eps: float = 1e-6, **_: Any) -> Tensor:
    """Return `x / sqrt(sum(x^2) + eps)` over the last dimension, as flash-linear-attention does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def has_kernels() -> bool:
    """Return whether flash-linear-attention is installed and the device is a GPU."""
    return bool(patches.original(f"{_COMMON}.HAVE_FLA")) and not is_cpu_device()


def replacements() -> dict[str, Any]:
    """Return what Megatron's layer takes from flash-linear-attention in deterministic mode too."""
    norm = common.l2norm if has_kernels() else normalize
    return {f"{_COMMON}.HAVE_FLA": True, f"{_COMMON}.l2norm": norm}
