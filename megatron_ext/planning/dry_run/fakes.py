"""Substitutes for data in a simulated step: evenly loaded experts and random logits.

In a simulated step, hidden states have shapes but no values. Code that reads values is replaced
in three places: every expert takes its mean share of the tokens of every rank; a router selects
tokens by random logits in host memory, with the same code as in training; attention uses the
kernel that does not store scores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron_ext import patches
from megatron_ext.config import ETConfig
from megatron_ext.moe.routing_metrics import RoutingCounts
from megatron_ext.moe.threshold_router import ThresholdRouter, threshold_routers
from megatron_ext.moe.thresholds import Thresholds
from megatron_ext.training.step import RoutingStep

# Tokens of the random logits of a router: a maximum, the least number that an expert selects, and
# a maximum over all micro-batches of a step.
_TOKENS, _TOKENS_OF_AN_EXPERT, _TOKENS_OF_A_STEP = 2048, 8, 65536
_aten = torch.ops.aten


class EvenLoad:
    """Router load in which every expert takes its mean share of the tokens of every rank.

    Args:
        config: Configuration of the model.
        microbatches: Micro-batches of the whole step. The end of the step receives logits of all
            of them, although fewer may run.

    Attributes:
        rate: Share of all tokens that one expert takes.
        kept_bytes: Bytes of the router logits that are stored until the end of the step.
    """

    def __init__(self, config: ETConfig, microbatches: int = 1) -> None:
        self.rate = expert_rate(config)
        self.microbatches = microbatches
        self.kept_bytes = 0
        self._copied = 0

    def rows(self, tokens: int) -> int:
        """Return how many of a rank's tokens one expert takes."""
        return round(self.rate * tokens)

    def answers(self) -> Mapping[Any, Callable[..., Any]]:
        """Return substitutes, for meta tensors, of operations whose results depend on data."""
        return {
            _aten._local_scalar_dense.default: lambda _, x: torch.zeros((), dtype=x.dtype).item(),
            _aten.masked_select.default: self._masked_select,
            _aten.bincount.default: lambda _, x, w=None, n=0: x.new_empty(n),
            _aten._to_copy.default: self._to_copy,
        }

    def _masked_select(self, _: Any, values: Tensor, mask: Tensor) -> Tensor:
        """Select by a mask `[experts, tokens]`, as Megatron's permutation of tokens does."""
        experts, tokens = mask.shape
        return values.new_empty(experts * self.rows(tokens))

    def _to_copy(self, func: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """Copy a tensor; the values of a copy on the host are the tokens of an expert."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "meta":
            return func(x, **kwargs)
        return torch.full(x.shape, self._copied, dtype=kwargs.get("dtype") or x.dtype)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the functions that need data, for the duration of a block."""
        with (
            patches.applied("dry run", self),
            patches.patched(ThresholdRouter, "select", self._random_selection()),
            patches.patched(RoutingStep, "resolve", self._whole_step()),
        ):
            yield

    def counts_on_host(self) -> Callable[..., Any]:
        """Return the function of a dispatcher that copies the counts of tokens to the host."""

        def counts_on_host(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
            if point != dispatcher.cuda_dtoh_point:
                return tokens_per_expert
            rows = self.rows(dispatcher.routing_map.shape[0])
            local, ep, tp = dispatcher.num_local_experts, dispatcher.ep_size, dispatcher.tp_size
            dispatcher.num_out_tokens = rows * dispatcher.num_experts
            if ep > 1 or tp > 1:
                dispatcher.input_splits = dispatcher.output_splits = [rows * local] * ep
                dispatcher.output_splits_tp = torch.full((tp,), rows * local * ep)
            dispatcher.num_global_tokens_per_local_expert = torch.full((tp * ep, local), rows)
            return torch.full((local,), rows * ep * tp)

        return counts_on_host

    def gathered(self) -> Callable[..., Any]:
        """Return the function of a dispatcher that runs after it has gathered tokens."""
        postprocess = token_dispatcher.MoEAllGatherTokenDispatcher.dispatch_postprocess

        def gathered(dispatcher: Any, hidden_states: Tensor, probs: Tensor) -> Any:
            self._copied = self.rows(hidden_states.shape[0])
            return postprocess(dispatcher, hidden_states, probs)

        return gathered

    def _random_selection(self) -> Callable[..., Tensor]:
        """Return a replacement for the selection of a router, which uses random logits."""
        select = ThresholdRouter.select

        def select_at_random(
            router: ThresholdRouter, logits: Tensor, positions: Tensor, counting: bool
        ) -> Tensor:
            before = len(router.cutoffs.buffered_logits)
            enough = int(_TOKENS_OF_AN_EXPERT / self.rate) + 1
            affordable = min(_TOKENS, _TOKENS_OF_A_STEP // self.microbatches)
            tokens = min(logits.shape[0], max(affordable, enough))
            sample = _random_logits(tokens, router.num_experts, self.rate)
            select(router, sample, torch.arange(tokens), counting)
            if len(router.cutoffs.buffered_logits) > before:
                self.kept_bytes += logits.numel() * logits.element_size()
            return torch.empty_like(logits, dtype=torch.bool)

        return select_at_random

    def _whole_step(self) -> Callable[..., None]:
        """Return a replacement for the end of a step, with logits of all its micro-batches."""
        resolve = RoutingStep.resolve

        def resolve_whole_step(step: RoutingStep, routers: Sequence[Any]) -> None:
            for router in threshold_routers(routers):
                sizes = [len(logits) for logits in router.cutoffs.buffered_logits]
                for i in range(len(sizes), self.microbatches if sizes else 0):
                    # New logits each time, because a search takes longer where values are tied.
                    tokens = sizes[i % len(sizes)]
                    logits = _random_logits(tokens, router.num_experts, self.rate)
                    router.cutoffs.keep(logits)
            resolve(step, routers)

        return resolve_whole_step


def replacements(load: EvenLoad) -> dict[str, Callable[..., Any]]:
    """Return the replacements of functions of Megatron and torch that read data."""
    dispatchers = "megatron.core.transformer.moe.token_dispatcher"
    return {
        f"{dispatchers}.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": (
            load.counts_on_host()
        ),
        f"{dispatchers}.MoEAllGatherTokenDispatcher.dispatch_postprocess": load.gathered(),
        "torch.nn.functional.scaled_dot_product_attention": _flash_attention,
        "megatron.core.optimizer.clip_grads.multi_tensor_applier": _zero_norm,
    }


def _random_logits(tokens: int, experts: int, rate: Fraction) -> Tensor:
    """Return normal logits, fp32 `[tokens, experts]`, of which the share `rate` is above 0."""
    quantile = NormalDist().inv_cdf(1.0 - float(rate)) if rate < 1 else -10.0
    return torch.randn(tokens, experts, device="cpu") - quantile


def expert_rate(config: ETConfig) -> Fraction:
    """Return the share of all tokens that one expert takes, 0 without experts."""
    experts = config.num_moe_experts
    return config.mean_experts / experts if experts else Fraction(0)


def prepare_router(router: ThresholdRouter, updates: int) -> None:
    """Put the state of a router into host memory.

    Args:
        router: Router of a model on the meta device.
        updates: Number of updates to which the counter of the thresholds, all 0, is set.
    """
    router.thresholds = Thresholds(router.num_experts, router.thresholds.decay, device="cpu")
    router.thresholds._updates_on_host = updates
    router.counts = RoutingCounts(router.num_experts).to_empty(device="cpu")
    router.counts.reset()


def _zero_norm(*args: Any) -> tuple[Tensor, None]:
    """Return 0 as the norm of the gradients; that of meta tensors has no value."""
    return torch.zeros(1, device="cuda"), None


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention by the kernel that does not store scores.

    On the meta device torch would choose the formula that stores every score.
    """
    if attn_mask is not None:
        attn_mask = query.new_empty(attn_mask.shape)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
