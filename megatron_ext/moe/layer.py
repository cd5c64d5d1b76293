"""Megatron's MoE layer with a variable number of experts a token."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class VariableFanOutDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher for any number of experts a token, none included.

    Megatron's own sends `tokens * topk` rows; here the routing map says how many.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count what goes where, see the base class; the number of rows is known only now."""
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert


class VariableFanOutMoELayer(MoELayer):
    """Megatron's MoE layer with the dispatcher above; the all-gather dispatcher works as it is."""

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
