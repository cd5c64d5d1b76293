"""Example of a router that somebody might add: see `docs/extending.md` and `test_registry.py`."""

import torch
from torch import Tensor

from megatron_ext.moe.registry import ROUTERS, RouterType
from megatron_ext.moe.router import ETRouter

TOP_P = RouterType(
    summary="A token goes to its most likely experts until their probabilities reach 0.4.",
    router="tests.moe.top_p_router:TopPRouter",
    variable_fan_out=True,
)


class TopPRouter(ETRouter):
    """Router that gives a token its most likely experts, up to a total probability."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select the experts whose better ones have a total probability below 0.4."""
        probs = logits.reshape(-1, self.num_experts).float().softmax(dim=-1)
        routing_map = self.margins(logits) > 0
        if padding_mask is not None:
            routing_map &= ~padding_mask.reshape(-1, 1)
        self.count(routing_map, padding_mask)
        return probs * routing_map, routing_map

    def margins(self, logits: Tensor) -> Tensor:
        """Return 0.4 minus the total probability of the better experts."""
        probs = logits.detach().reshape(-1, self.num_experts).float().softmax(dim=-1)
        best, order = probs.sort(dim=-1, descending=True)
        better = torch.empty_like(probs).scatter_(1, order, best.cumsum(dim=-1) - best)
        return 0.4 - better


def register() -> None:
    """Add the router to the registry of this process."""
    ROUTERS["top-p"] = TOP_P
