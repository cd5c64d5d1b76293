"""Duration of a training step by phase, on this rank.

Hooks around Megatron's modules, forward and backward, and around a few functions maintain a stack
of phases; time is attributed to the innermost. On the CPU, autograd runs in the caller's thread and
in the exact reverse order of the forward pass, so that phases are nested there as well.

    attention   with its projections
    experts     routed and shared, and the feed-forward of dense layers
    dispatch    the rest of an MoE layer: permutation, all-to-all, sum
    router      gating, selection, gates
    cutoffs     searches for them, and the routing metrics at the end of the step
    gradients   their reduction
    optimizer   with the gathering of parameters
    data        the next batch
    other       embedding, norms, output head, loss, clearing gradients
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.moe import step_cutoffs, threshold_router
from megatron_ext.training import data_loading as data
from megatron_ext.training import step


class Phases:
    """Stopwatch with a stack of phases.

    Attributes:
        seconds: Seconds by phase; `other` outside of all phases.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack = ["other"]
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        self._lap()
        self._stack.append(phase)

    def leave(self, phase: str) -> None:
        self._lap()
        innermost = self._stack.pop()
        assert innermost == phase, f"phase {phase} ended inside {innermost}"

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    @contextmanager
    def measuring(self, model: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
        """Measure the phases of `model` and `optimizer` in this block."""
        functions = [
            (data, "_get_batch", "data"),
            (step_cutoffs, "kth_largest", "cutoffs"),
            (threshold_router, "kth_largest", "cutoffs"),
            (threshold_router, "top_k_mask", "cutoffs"),
            (step.RoutingStep, "resolve", "cutoffs"),
            (step.RoutingStep, "commit", "cutoffs"),
            (step, "finalize_model_grads", "gradients"),
            (optimizer, "step", "optimizer"),
        ]
        with ExitStack() as stack:
            for owner, name, phase in functions:
                timed = self._timed(getattr(owner, name), phase)
                stack.enter_context(mock.patch.object(owner, name, timed))
            for module, phase in _modules(model):
                for handle in self._hooks(module, phase):
                    stack.callback(handle.remove)
            self._since = time.perf_counter()
            yield
            self._lap()
            assert self._stack == ["other"], self._stack

    def _timed(self, function: Any, phase: str) -> Any:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(phase)

        return timed

    def _hooks(self, module: torch.nn.Module, phase: str) -> list[Any]:
        def call(action: Any, *_: Any) -> None:
            action(phase)

        enter, leave = partial(call, self.enter), partial(call, self.leave)
        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
            module.register_full_backward_pre_hook(enter),
            module.register_full_backward_hook(leave),
        ]


def _modules(model: Sequence[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str]]:
    for module in (module for chunk in model for module in chunk.modules()):
        if isinstance(module, SelfAttention):
            yield module, "attention"
        elif isinstance(module, Router):
            yield module, "router"
        elif isinstance(module, MoELayer):
            yield module, "dispatch"
            yield module.experts, "experts"
            if module.shared_experts is not None:
                yield module.shared_experts, "experts"
        elif isinstance(module, TransformerLayer) and not isinstance(module.mlp, MoELayer):
            yield module.mlp, "experts"
