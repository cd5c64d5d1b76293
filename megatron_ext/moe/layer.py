"""Megatron's MoE layer with a variable number of experts per token."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class VariableFanOutDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher for any number of experts per token, including none.

    Megatron's sends `tokens * topk` rows; this one sends as many as the routing map selects.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count the tokens of each expert, and the rows to send, which are known only now."""
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert


class VariableFanOutMoELayer(MoELayer):
    """Megatron's MoE layer with the dispatcher above.

    Megatron's all-gather dispatcher needs no change.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableFanOutDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=kwargs["pg_collection"],
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
