"""Example of a router that somebody might add: see `docs/how-to/extending.md`."""

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

    def margins(self, logits: Tensor) -> Tensor:
        """Return 0.4 minus the total probability of the better experts."""
        best, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        better = torch.empty_like(best).scatter_(1, order, best.cumsum(dim=-1) - best)
        return 0.4 - better


def register() -> None:
    """Add the router to the registry of this process."""
    ROUTERS["top-p"] = TOP_P
