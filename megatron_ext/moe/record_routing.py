"""Seeing what routers decide, wherever and for whatever the model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ext.moe.router import ThresholdRouter, TokenChoiceRouter

Saw = Callable[[ThresholdRouter | TokenChoiceRouter, Tensor, Tensor], None]


@contextmanager
def watched(routers: Sequence[ThresholdRouter | TokenChoiceRouter], saw: Saw) -> Iterator[None]:
    """Let `saw(router, logits, routing map)` be called whenever one of the routers has routed.

    Both are `[tokens, experts]` of the tokens that this rank routes, sequence first: fp32, as the
    router's linear map gives them, and bool.
    """

    @torch.no_grad()
    def tell(router: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        logits = router.gating(args[0]).float()
        saw(router, logits.reshape(-1, logits.shape[-1]), output[1].bool())

    hooks = [router.register_forward_hook(tell) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
