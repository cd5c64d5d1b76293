"""The decoder: Megatron's stack of layers, in which two positions make up a transformer layer.

Megatron's `HybridModel` has an attention layer `*`, a Gated DeltaNet layer `G` or a Mamba layer `M`
at one position and an MLP `-` or a layer of experts `E` at the next. Everywhere else layers are
transformer layers: in flags, metrics and the numbers of modules. Checkpoints have the names that
Megatron's `GPTModel` gives to tensors, so that a model of either class loads them with their
optimizer state.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.cuda_graphs import annotate_first_last_layer
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_ext.config import (
    ETConfig,
    is_hybrid,
    linear_attention_pattern,
    mamba_pattern,
    moe_layer_pattern,
)
from megatron_ext.model.norm import RMSNorm

POSITIONS = 2
"""Positions of the stack that make up a transformer layer."""


def hybrid_layer_pattern(config: ETConfig) -> str:
    """Return Megatron's pattern of the decoder, with its pipeline stages in their order.

    >>> hybrid_layer_pattern(config)  # 4 layers, the first of them dense, 2 pipeline stages
    '*-*E|*E*E'
    """
    layers = layer_symbols(config)
    stages, first = [], 0
    for count in _stage_sizes(config):
        stages.append("".join(layers[first : first + count]))
        first += count
    assert first == len(layers)
    depths = [layers[-1]] * (config.mtp_num_layers or 0)
    return Symbols.MTP_SEPARATOR.join([Symbols.PIPE.join(stages), *depths])


def layer_symbols(config: ETConfig) -> list[str]:
    """Return the symbols of the two positions of each transformer layer."""
    linear, mamba = linear_attention_pattern(config), mamba_pattern(config)
    return [
        (Symbols.GDN if linear else Symbols.MAMBA if mamba else Symbols.ATTENTION)
        + (Symbols.MOE if moe else Symbols.MLP)
        for linear, mamba, moe in zip(linear, mamba, moe_layer_pattern(config), strict=True)
    ]


def _stage_sizes(config: ETConfig) -> list[int]:
    """Return the number of transformer layers of each pipeline stage, in the order of the model."""
    ranks, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if ranks == 1:
        return [config.num_layers]
    stages = [(rank, chunk) for chunk in range(chunks or 1) for rank in range(ranks)]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return [layout.layout[rank][chunk].count(LayerType.decoder) for rank, chunk in stages]
    return [
        get_num_layers_to_build(config, chunk if chunks else None, rank) for rank, chunk in stages
    ]


class LayerStack(HybridStack):
    """Stack of the attention, recurrent, MLP and expert layers of one pipeline stage."""

    def __init__(
        self,
        config: ETConfig,
        submodules: HybridStackSubmodules,
        *,
        layer_type_list: Sequence[str],
        pp_layer_offset: int,
        pg_collection: ProcessGroupCollection,
        name: str,
        **kwargs: Any,
    ) -> None:
        """Build the layers.

        Args:
            config: Configuration of the model.
            submodules: Specification of each kind of layer.
            layer_type_list: Symbols of this stage's positions.
            pp_layer_offset: Number of positions in earlier stages.
            pg_collection: Process groups of the model.
            name: Name of the stack in the model.
            kwargs: Further arguments of Megatron's stack.
        """
        # Megatron's stack numbers layers by position, and its norm is Transformer Engine's.
        super().__init__(
            config,
            submodules,
            layer_type_list=[],
            post_layer_norm=False,
            pg_collection=pg_collection,
            name=name,
            **kwargs,
        )
        specs = {
            Symbols.ATTENTION: submodules.attention_layer,
            Symbols.GDN: submodules.gdn_layer,
            Symbols.MAMBA: submodules.mamba_layer,
            Symbols.MLP: submodules.mlp_layer,
            Symbols.MOE: submodules.moe_layer,
        }
        self.layer_type_list = list(layer_type_list)
        for position, symbol in enumerate(layer_type_list):
            number = (pp_layer_offset + position) // POSITIONS + 1
            with _quantized_initialization(config, number - 1):
                layer = build_module(
                    specs[symbol],
                    config=config,
                    layer_number=number,
                    pg_collection=pg_collection,
                    add_layer_offset=False,
                    name=f"{name}.layers.{position}",
                )
            self.layers.append(layer)
        self.num_layers_per_pipeline_rank = len(self.layers)
        if config.cuda_graph_impl == "local":
            annotate_first_last_layer(self.layers)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        if config.recompute_num_layers is not None:  # a number of transformer layers
            self.config = copy.copy(config)
            self.config.recompute_num_layers *= POSITIONS

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layers of this stage; see Megatron's `HybridStack`."""
        # Tensor-parallel ranks have different tokens and must drop different activations.
        different = self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if different else nullcontext():
            output = super().forward(hidden_states, *args, **kwargs)
        # The pipeline schedule frees the output of a stage, which must not be its input.
        return output.clone() if output is self.input_tensor else output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the tensors under the names that Megatron's `TransformerBlock` gives them."""
        assert not sharded_offsets
        stacked = self._saves_stacked_layers(metadata or {})
        state: dict[str, Any] = {}
        for position, layer in enumerate(self.layers):
            local, number = f"{prefix}layers.{position}.", layer.layer_number - 1
            offsets = [(0, number, self.config.num_layers)] if stacked else []
            part = layer.sharded_state_dict(local, offsets, metadata)
            saved = f"{prefix}layers." if stacked else f"{prefix}layers.{number}."
            replace_prefix_for_sharding(part, local, saved)
            state |= part
        if self.post_process:
            local, saved = f"{prefix}final_norm.", f"{prefix}final_layernorm."
            part = sharded_state_dict_default(
                self.final_norm, local, (), metadata, tp_group=self.tp_group
            )
            replace_prefix_for_sharding(part, local, saved)
            state |= part
        return state

    def _saves_stacked_layers(self, metadata: dict[str, Any]) -> bool:
        """Return whether identical layers are saved as one tensor, by `TransformerBlock`'s rule."""
        frequency = self.config.moe_layer_freq
        separate = (
            is_hybrid(self.config)
            or metadata.get("non_homogeneous_layers", False)
            or metadata.get("singleton_local_shards", False)
            or self.config.hetereogenous_dist_checkpoint
        )
        return not (separate or isinstance(frequency, list) or frequency > 1)


def _quantized_initialization(config: ETConfig, layer: int) -> AbstractContextManager[Any]:
    if config.fp8:
        return get_fp8_context(config, layer, is_init=True)
    if config.fp4:
        return get_fp4_context(config, layer, is_init=True)
    return nullcontext()
