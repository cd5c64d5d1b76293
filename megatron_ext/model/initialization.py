"""Initial weights that depend on the seed and the parameter alone.

Megatron draws each shard from a random stream per rank, so that the same seed gives a different
model on another layout. Here each matrix has a separate generator, seeded by its global name; a
rank draws the whole matrix and keeps its shard.
"""

import hashlib
import math
import re
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor

from megatron_ext.config import ETConfig


def initialize_parameters(model: HybridModel, seed: int, vocab_size: int) -> None:
    """Set every parameter of one pipeline stage.

    Args:
        model: One stage, not yet wrapped.
        seed: Seed that, together with a parameter's name, determines its value.
        vocab_size: Size of the vocabulary without the padding for tensor parallelism, whose rows
            are 0.

    Raises:
        ValueError: No rule covers a parameter.
    """
    config = model.config
    assert isinstance(config, ETConfig)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        name = global_parameter_name(model, name)
        value = _value(name, parameter, layer, model, seed, vocab_size)
        with torch.no_grad():
            parameter.copy_(value)


def global_parameter_name(model: HybridModel, name: str) -> str:
    """Return a parameter's name in every layout, with global numbers of layers and experts.

    These are the names in checkpoints, in which a layer is a transformer layer, not a position of
    the model's stack.

    >>> 'decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight'  # stage 2, EP rank 1
    'decoder.layers.2.mlp.experts.3.linear_fc1.weight'
    """
    layer_match = re.match(r"(decoder|mtp\.layers\.\d+\.mtp_model_layer)\.layers\.(\d+)\.", name)
    if layer_match is None:
        return name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    stack = layer_match[1]
    layer: Any = model.get_submodule(f"{stack}.layers.{layer_match[2]}")
    stack = stack.replace(".mtp_model_layer", ".transformer_layer")
    name = f"{stack}.layers.{layer.layer_number - 1}.{name[layer_match.end() :]}"

    def global_expert(local: str) -> str:
        return f"experts.{layer.mlp.local_expert_indices[int(local)]}"

    name = re.sub(r"experts\.local_experts\.(\d+)", lambda m: global_expert(m[1]), name)
    return re.sub(  # grouped experts: one parameter per expert, numbered at the end
        r"experts\.(linear_fc[12]\.(?:weight|bias))(\d+)$",
        lambda m: f"{global_expert(m[2])}.{m[1]}",
        name,
    )


def _value(
    name: str, parameter: Any, layer: Any, model: HybridModel, seed: int, vocab_size: int
) -> Tensor:
    config = model.config
    if not isinstance(layer, MambaMixer):  # whose biases are drawn
        if name.endswith("dt_bias"):
            return torch.ones_like(parameter)
        if name.endswith("bias"):
            return torch.zeros_like(parameter)
    if name.endswith(("norm.weight", ".D")):
        return torch.ones_like(parameter)
    expert = not getattr(parameter, "allreduce", True)
    group = model.pg_collection.expt_tp if expert else model.pg_collection.tp
    sharded = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
    shape = list(parameter.shape)
    if sharded:
        shape[parameter.partition_dim] *= group.size()
    vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    rows = shape[0]
    if vocabulary:
        shape[0] = min(rows, vocab_size)
    # Rows of the blocks that are sharded separately, if there are several.
    blocks = [size * group.size() for size in getattr(parameter, "partition_sizes", ())]
    full = _draw(name, shape, blocks, config, seed)
    if vocabulary and rows > shape[0]:
        full = torch.cat([full, full.new_zeros(rows - shape[0], shape[1])])
    if not sharded:
        return full
    if blocks:
        parts = [block.chunk(group.size())[group.rank()] for block in full.split(blocks)]
        return torch.cat(parts)
    # A gated fc1 keeps its rank's part of both halves: the stride counts them.
    dim, stride = parameter.partition_dim, getattr(parameter, "partition_stride", 1)
    shards = full.chunk(group.size() * stride, dim=dim)
    return torch.cat(shards[group.rank() :: group.size()], dim=dim)


def _draw(name: str, shape: list[int], blocks: list[int], config: ETConfig, seed: int) -> Tensor:
    """Return the whole tensor of a name in fp32: a matrix `[d_out, d_in]`, except where noted."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if name.endswith("A_log"):  # [heads]; this and the next as Megatron draws them
        return torch.empty(shape).uniform_(1, 16, generator=generator).log()
    if name.endswith("dt_bias"):  # [heads], whose softplus is between 0.001 and 0.1
        step = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1), generator=generator)
        return step.exp().expm1().log()
    if "conv1d" in name:  # [channels, 1, kernel], or the bias [channels] of Mamba's kernel of 4
        bound = (shape[-1] if len(shape) > 1 else 4) ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    d_out, d_in = shape
    residual = name.endswith(("linear_proj.weight", "linear_fc2.weight", "out_proj.weight"))
    std: float | Tensor
    if config.et_init == "normal":
        std = config.init_method_std
        if residual:
            std /= (2 * config.num_layers) ** 0.5
    elif name == "output_layer.weight" or residual:
        return torch.zeros(shape)
    elif name == "embedding.word_embeddings.weight":
        std = 1.0
    elif name.endswith(("router.weight", "gate_weight")):
        std = d_in**-0.5
    elif name.endswith("linear_qkv.weight"):
        std = _qkv_std(d_in, config)
    elif name.endswith("in_proj.weight"):
        std = _recurrent_std(d_in, blocks)
    elif name.endswith("eh_proj.weight"):
        std = _fan_std(d_out, d_in)
    elif name.endswith("linear_fc1.weight"):
        d_out //= 2 if config.gated_linear_unit else 1
        std = _fan_std(d_out, d_in)
    else:
        raise ValueError(f"No rule initializes {name} {shape}. Add one to {__name__}.")
    return torch.randn(shape, generator=generator) * std


def _fan_std(d_out: int, d_in: int) -> float:
    return d_in**-0.5 * min(1.0, (d_out / d_in) ** 0.5)


def _qkv_std(d_in: int, config: ETConfig) -> Tensor:
    """Return the standard deviation by row, `[d_out, 1]`.

    Megatron interleaves q, k and v by KV head.
    """
    heads, kv_heads, head_dim = (
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
    )
    assert kv_heads is not None and head_dim is not None
    q = torch.full((heads // kv_heads * head_dim,), _fan_std(heads * head_dim, d_in))
    kv = torch.full((2 * head_dim,), _fan_std(kv_heads * head_dim, d_in))
    return torch.cat([q, kv]).repeat(kv_heads).unsqueeze(1)


def _recurrent_std(d_in: int, blocks: list[int]) -> Tensor:
    """Return the standard deviation by row, `[d_out, 1]`, of a recurrent layer's input projection.

    Its first four blocks are of vectors: queries, keys, values and the gate of the output. The
    others have a row for each head, and are scaled as a router.
    """
    stds = [
        torch.full((rows,), _fan_std(rows, d_in) if index < 4 else d_in**-0.5)
        for index, rows in enumerate(blocks)
    ]
    return torch.cat(stds).unsqueeze(1)
