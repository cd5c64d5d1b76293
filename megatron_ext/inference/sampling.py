"""Choosing the next token from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn and when it ends.

    Attributes:
        max_new_tokens: the most tokens of a continuation.
        temperature: divides the logits.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability, after top_k.
        greedy: always take the likeliest token; the three above are then not looked at.
        stop: strings that end a continuation; not part of its text.
        stop_at_eod: whether the end tokens of the model end it.
        score_temperature: divides the logits whose log-probabilities are told.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    stop_at_eod: bool = True
    score_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"--temperature {self.temperature} must be above 0; use --greedy for the likeliest "
                "token"
            )
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must not be negative; 0 is no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be in (0, 1]")
        if not all(self.stop):
            raise UserError("--stop must not be empty")

    @property
    def distribution(self) -> tuple[object, ...]:
        """What rows must have in common for one call of `choose`."""
        return (self.greedy,) if self.greedy else (self.temperature, self.top_k, self.top_p)


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row.

    A row draws one number from its own generator and looks at nothing of the other rows.

    Args:
        logits: `[rows, vocabulary]`; -inf for what must not be chosen.
        generators: one a row, on the CPU.

    Returns:
        int64 `[rows]`.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs[:, sampling.top_k :] = 0
        likelier = probs.cumsum(dim=-1) - probs
        probs[likelier >= sampling.top_p * probs.sum(dim=-1, keepdim=True)] = 0
    cumulative = probs.cumsum(dim=-1)
    draws = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    mark = torch.stack(draws).to(cumulative.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, mark, right=True).clamp(max=probs.shape[1] - 1)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1)


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities the model itself gives tokens: temperature 1, nothing cut off.

    Args:
        logits: `[rows, vocabulary]`.
        tokens: int64 `[rows]`.

    Returns:
        fp32 `[rows]`, nats.
    """
    logits = logits.float()
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
