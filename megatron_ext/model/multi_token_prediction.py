"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): Megatron's, with layers of this project.

Each depth predicts one token further ahead: from the hidden states of the depth before and the
embedding of the next token, by a separate transformer layer, whose experts have separate
thresholds. Training adds the losses of all depths; inference has no use for them.
"""

import copy
from typing import Any

import torch.distributed as dist
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_ext import patches
from megatron_ext.config import ETConfig
from megatron_ext.model.layer_stack import POSITIONS, LayerStack, layer_symbols
from megatron_ext.model.norm import RMSNorm


class PredictionDepth(MultiTokenPredictionLayer):
    """One depth: norms, the projection of hidden state and embedding, and a transformer layer."""

    def __init__(
        self,
        config: ETConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        *,
        mtp_layer_pattern: str,
        hybrid_submodules: HybridStackSubmodules,
        **kwargs: Any,
    ) -> None:
        """Build the depth.

        Args:
            config: Configuration of the model.
            submodules: Specification of the depth.
            mtp_layer_pattern: Not used. From a pattern, Megatron builds its own stack, and without
                one the layer of the specification.
            hybrid_submodules: Not used either.
            kwargs: Further arguments of Megatron's depth.
        """
        super().__init__(config, submodules, **kwargs)


class PredictionStack(LayerStack):
    """Transformer layer of a depth, numbered after those of the decoder."""

    def __init__(
        self,
        config: ETConfig,
        submodules: HybridStackSubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        name: str,
        **_: Any,
    ) -> None:
        """Build the layer.

        Args:
            config: Configuration of the model.
            submodules: Specification of each kind of layer.
            layer_number: Number of the depth, from 1.
            pg_collection: Process groups of the model.
            name: Name of the stack in the model.
        """
        super().__init__(
            config,
            submodules,
            layer_type_list=layer_symbols(config)[-1],
            pp_layer_offset=(config.num_layers + layer_number - 1) * POSITIONS,
            pg_collection=pg_collection,
            name=name,
            pre_process=True,
            post_process=False,  # the depth has its own norm
        )
        # The depth as a whole is recomputed.
        self.config = copy.copy(self.config)
        self.config.recompute_granularity = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer; see Megatron's `MultiTokenPredictionLayer`, whose call this answers."""
        output = super().forward(
            hidden_states,
            attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        return output, None

    def _saves_stacked_layers(self, metadata: dict[str, Any]) -> bool:
        return False


_ROLL = "megatron.core.transformer.multi_token_prediction.roll_tensor"


def roll_tensor(tensor: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the shifted tensor, and the mean of its sum over the context-parallel ranks.

    Megatron divides the loss of a depth by the sum of the shifted mask. Each rank has only a part
    of every text, and those that end a text predict fewer tokens.
    """
    rolled, total = patches.original(_ROLL)(tensor, *args, **kwargs)
    group = kwargs.get("cp_group")
    if tensor is not None and group is not None and group.size() > 1:
        total = total.float()
        dist.all_reduce(total, group=group)
        total /= group.size()
    return rolled, total


def replacements() -> dict[str, Any]:
    """Return the function by which the losses of depths are those of one rank."""
    return {_ROLL: roll_tensor}


def prediction_spec(backend: BackendSpecProvider, layers: HybridStackSubmodules) -> ModuleSpec:
    """Return the specification of all depths.

    Args:
        backend: Provider of linear layers.
        layers: Specification of each kind of layer.
    """
    depth = MultiTokenPredictionLayerSubmodules(
        enorm=RMSNorm,
        hnorm=RMSNorm,
        layer_norm=RMSNorm,
        eh_proj=backend.column_parallel_linear(),
        mtp_model_layer=ModuleSpec(module=PredictionStack, submodules=layers),
    )
    specs = [ModuleSpec(module=PredictionDepth, submodules=depth)]
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=specs),
    )
