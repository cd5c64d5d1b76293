"""Checks of the sizes of recurrent layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.config import ETConfig


def check_linear_attention(config: "ETConfig") -> None:
    """Refuse sizes of Gated DeltaNet layers that do not fit each other or the layout.

    Raises:
        UserError: The message names the flags and what to do.
    """
    for name in (
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_conv_kernel_dim"),
    ):
        if getattr(config, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1. "
                "Choose another value."
            )
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        raise UserError(
            f"--linear-num-value-heads {values} is not divisible by --linear-num-key-heads "
            f"{keys}. Choose a multiple of {keys}."
        )
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    if keys % (tensor * context):
        flags = f"--tensor-model-parallel-size {tensor}"
        if context > 1:
            flags += f" times --context-parallel-size {context}"
        raise UserError(
            f"--linear-num-key-heads {keys} is not divisible by {flags}: the ranks share the "
            f"heads of a Gated DeltaNet layer. Choose a multiple of {tensor * context}, or "
            "another layout."
        )


def check_mamba(config: "ETConfig", linear: Sequence[bool]) -> None:
    """Refuse a list of Mamba layers that is wrong, and sizes that do not fit.

    Args:
        config: Configuration whose list is not empty.
        linear: Which layers are Gated DeltaNet layers.

    Raises:
        UserError: The message names the flags and what to do.
    """
    flag = f"--mamba-layers {' '.join(map(str, config.mamba_layers))}"
    if len(config.mamba_layers) != config.num_layers or not set(config.mamba_layers) <= {0, 1}:
        raise UserError(
            f"{flag} must be a 0 or a 1 for each of the {config.num_layers} layers. Change it, or "
            "use --hybrid-layer-pattern."
        )
    if any(mamba and delta for mamba, delta in zip(config.mamba_layers, linear)):
        raise UserError(
            f"{flag} has layers that are Gated DeltaNet layers by --linear-attention-freq "
            f"{config.linear_attention_freq}. Use --hybrid-layer-pattern in place of both."
        )
    for name in ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {value} must be at least 1. Choose another value."
            )
    size, groups = config.mamba_head_dim, config.mamba_num_groups
    if config.mamba_num_heads is None and 2 * config.hidden_size % size:
        raise UserError(
            f"Twice --hidden-size {config.hidden_size} is not divisible by --mamba-head-dim "
            f"{size}. Choose a divisor, or the number of heads by --mamba-num-heads."
        )
    heads = config.mamba_num_heads or 2 * config.hidden_size // size
    if heads % groups:
        raise UserError(
            f"The {heads} heads of a Mamba layer are not divisible by --mamba-num-groups "
            f"{groups}. Choose a divisor, or other heads by --mamba-num-heads."
        )
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    layout = f"--tensor-model-parallel-size {tensor}"
    if groups % tensor:
        raise UserError(
            f"--mamba-num-groups {groups} is not divisible by {layout}: the ranks share the "
            f"groups of a Mamba layer. Choose a multiple of {tensor}, or another layout."
        )
    if context > 1:
        layout += f" times --context-parallel-size {context}"
    if heads % (tensor * context):
        raise UserError(
            f"The {heads} heads of a Mamba layer are not divisible by {layout}: the ranks "
            "share them. Choose other heads by --mamba-num-heads, or another layout."
        )
    local = groups // tensor
    if local % context and context % local:
        raise UserError(
            f"--mamba-num-groups {groups} is neither a multiple nor a divisor of {layout}. "
            "Choose another number of groups, or another layout."
        )
