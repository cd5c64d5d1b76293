"""Record what routers decide, wherever and for whatever purpose the model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ext.moe.router import ETRouter

RoutingCallback = Callable[[ETRouter, Tensor, Tensor], None]
"""Receives a router, its logits, fp32, and its routing map, bool, both `[tokens, experts]`."""


@contextmanager
def record_routing(routers: Sequence[ETRouter], callback: RoutingCallback) -> Iterator[None]:
    """Call a function whenever one of the routers has routed, until the end of the block.

    Args:
        routers: Routers to record.
        callback: Receives the decisions on the tokens that this rank routes, sequence first. The
            logits are those of the router's linear map.
    """

    @torch.no_grad()
    def hook(router: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        logits = router.gating(args[0]).float()
        callback(router, logits.reshape(-1, logits.shape[-1]), output[1].bool())

    hooks = [router.register_forward_hook(hook) for router in routers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
