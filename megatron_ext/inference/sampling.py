"""Sampling of the next token from logits."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a continuation and of its end.

    Logits are modified in the order of vLLM: `logit_bias`, `repetition_penalty`,
    `frequency_penalty` and `presence_penalty`, `min_tokens`, `temperature`, `min_p`, `top_k`,
    `top_p`.

    Attributes:
        max_new_tokens: Maximum length of a continuation, in tokens.
        temperature: Divisor of the logits.
        top_k: Number of most likely tokens to sample from; 0 for all.
        top_p: Total probability of the most likely tokens to sample from, after `top_k`.
        greedy: Whether the most likely token is always chosen. `temperature`, `min_p`, `top_k` and
            `top_p` then have no effect.
        stop: Strings that end a continuation and do not belong to its text.
        stop_at_eod: Whether the end tokens of the model end a continuation.
        score_temperature: Divisor of the logits whose log-probabilities are reported.
        min_p: Minimum probability of a token to sample, relative to that of the most likely token.
        min_tokens: Number of tokens before which no end token can be sampled and no stop string
            ends the continuation.
        stop_token_ids: Further tokens that end a continuation and do not belong to its text.
        repetition_penalty: Divisor of positive and factor of negative logits of tokens that the
            prompt or the continuation contains.
        frequency_penalty: Amount subtracted from a token's logit for each of its occurrences in the
            continuation.
        presence_penalty: Amount subtracted once from the logits of tokens in the continuation.
        logit_bias: Pairs of a token id and an amount that is added to its logit.
        skip_special_tokens: Whether special tokens are omitted from the text.
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
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens} is below 1. Set it to 1 or more."
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"--temperature {self.temperature} is not above 0. Set it above 0, or use --greedy "
                "to choose the most likely token."
            )
        if self.top_k < 0:
            raise UserError(
                f"--top-k {self.top_k} is negative. Set it to 1 or more, or to 0 for no limit."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"--top-p {self.top_p} is out of range. Set it above 0 and to at most 1."
            )
        if not all(self.stop):
            raise UserError("--stop is empty. Give a text of at least one character.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} is out of range. Set it from 0 to 1.")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_tokens {self.min_tokens} is out of range. Set it from 0 to the maximum "
                f"number of new tokens, {self.max_new_tokens}."
            )
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise UserError(
                f"repetition_penalty {self.repetition_penalty} is not above 0. Set it above 0."
            )

    @property
    def distribution(self) -> tuple[object, ...]:
        """Key of the settings that rows must share for one call of `choose`."""
        if self.greedy:
            return (True,)
        return (self.temperature, self.min_p, self.top_k, self.top_p)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether `adjust` changes logits, depending on token ids or on the row's tokens."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1, 0, 0) or self.min_tokens > 0 or bool(self.logit_bias)


def adjust(
    logits: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    tokens: Sequence[int],
    ends: Collection[int],
) -> Tensor:
    """Apply the bias, the penalties and the minimum length to the logits of one row.

    Args:
        logits: Logits of the next token, `[vocabulary]`.
        sampling: Settings of the row.
        prompt: Token ids of the prompt.
        tokens: Token ids of the continuation so far.
        ends: Tokens that end the row.

    Returns:
        Logits, fp32 `[vocabulary]`; -inf for tokens that must not be chosen.
    """
    logits = logits.float().clone()
    device = logits.device
    if sampling.logit_bias:
        ids, bias = zip(*sampling.logit_bias)
        logits[list(ids)] += torch.tensor(bias, device=device)
    if sampling.repetition_penalty != 1:
        repeated = torch.tensor(sorted({*prompt, *tokens}), device=device)
        values = logits[repeated]
        penalty = sampling.repetition_penalty
        logits[repeated] = torch.where(values > 0, values / penalty, values * penalty)
    if tokens and (sampling.frequency_penalty or sampling.presence_penalty):
        sampled, counts = torch.tensor(tokens, device=device).unique(return_counts=True)
        logits[sampled] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if len(tokens) < sampling.min_tokens and ends:
        logits[list(ends)] = -torch.inf
    return logits


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose the next token of each row.

    Each row draws one number from its own generator and is independent of the other rows.

    Args:
        logits: Logits, `[rows, vocabulary]`; -inf for tokens that must not be chosen.
        sampling: Settings of all rows.
        generators: Generator of each row, on the CPU.

    Returns:
        Token ids, int64 `[rows]`.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    # In place: new memory for every intermediate result costs more than the arithmetic.
    logits = logits.to(torch.float64, copy=True)
    logits -= logits.amax(dim=-1, keepdim=True)  # finite at any temperature
    if sampling.temperature != 1:
        logits /= sampling.temperature
    probs = logits.exp_()  # relative to the most likely token; their sum is not needed
    if sampling.min_p:
        probs[probs < sampling.min_p] = 0
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        probs, ids = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs[:, sampling.top_k :] = 0
        likelier = probs.cumsum(dim=-1) - probs
        probs[likelier >= sampling.top_p * probs.sum(dim=-1, keepdim=True)] = 0
    cumulative = probs.cumsum_(dim=-1)
    draws = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    mark = torch.stack(draws).to(cumulative.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, mark, right=True).clamp(max=probs.shape[1] - 1)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1)


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the log-probabilities of tokens, without top-k or other truncation.

    Args:
        logits: Logits, `[rows, vocabulary]`.
        tokens: Token ids, int64 `[rows]`.

    Returns:
        Log-probabilities in nats, fp32 `[rows]`.
    """
    logits = logits.float()
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
