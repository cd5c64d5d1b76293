"""Choosing the next token from logits."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn and when it ends.

    Logits are changed in the order of vLLM: `logit_bias`, `repetition_penalty`,
    `frequency_penalty` and `presence_penalty`, `min_tokens`, `temperature`, `min_p`, `top_k`,
    `top_p`.

    Attributes:
        max_new_tokens: the most tokens of a continuation.
        temperature: divides the logits.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability, after top_k.
        greedy: always take the likeliest token; temperature, min_p, top_k and top_p have then no
            effect.
        stop: strings that end a continuation; not part of its text.
        stop_at_eod: whether the end tokens of the model end it.
        score_temperature: divides the logits whose log-probabilities are reported.
        min_p: draw among the tokens with at least this share of the likeliest one's probability.
        min_tokens: before so many tokens, none that ends the continuation can be drawn, and no stop
            string ends in their text.
        stop_token_ids: further tokens that end a continuation; not part of its text.
        repetition_penalty: divides positive logits and multiplies negative ones of tokens that the
            prompt or the continuation contains.
        frequency_penalty: subtracted from the logit of a token for each time the continuation
            contains it.
        presence_penalty: subtracted once from the logits of tokens that the continuation contains.
        logit_bias: pairs of a token id and what is added to its logit.
        skip_special_tokens: whether special tokens have no text.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    stop_at_eod: bool = True
    score_temperature: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    skip_special_tokens: bool = True

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
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} must be from 0 to 1")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_tokens {self.min_tokens} must be from 0 to the most new tokens, "
                f"{self.max_new_tokens}"
            )
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be above 0")

    @property
    def distribution(self) -> tuple[object, ...]:
        """What rows must have in common for one call of `choose`."""
        if self.greedy:
            return (True,)
        return (self.temperature, self.min_p, self.top_k, self.top_p)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether `adjust` changes logits: whether a token's chance depends on what it is or on
        what came before it in the row."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1, 0, 0) or self.min_tokens > 0 or bool(self.logit_bias)


def adjust(
    logits: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    tokens: Sequence[int],
    ends: Collection[int],
) -> Tensor:
    """Apply bias, penalties and the least number of tokens to the logits of one row.

    Args:
        logits: `[vocabulary]`.
        sampling: of the row.
        prompt: token ids.
        tokens: ids of the continuation so far.
        ends: tokens that end the row.

    Returns:
        fp32 `[vocabulary]`; -inf for what must not be chosen.
    """
    logits = logits.float().clone()
    device = logits.device
    if sampling.logit_bias:
        ids, bias = zip(*sampling.logit_bias)
        logits[list(ids)] += torch.tensor(bias, device=device)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *tokens}), device=device)
        theirs = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(theirs > 0, theirs / penalty, theirs * penalty)
    if tokens and (sampling.frequency_penalty or sampling.presence_penalty):
        own, counts = torch.tensor(tokens, device=device).unique(return_counts=True)
        logits[own] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if len(tokens) < sampling.min_tokens and ends:
        logits[list(ends)] = -torch.inf
    return logits


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
    logits = logits.double()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # finite at any temperature
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.min_p:
        probs[probs < sampling.min_p * probs.amax(dim=-1, keepdim=True)] = 0
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
