"""Losses of policies, by name.

Each is one clipped policy gradient with other settings: what a ratio is of, how far it may go, how
tokens are averaged, what keeps the policy near another. Everything that depends on rewards alone is
in the advantages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from alignment.engines.batch import PADDING, TokenBatch
from alignment.engines.protocol import LossSums, TokenScores
from megatron_ext.errors import UserError

Aggregation = Literal["token-mean", "sample-mean", "sample-sum"]
Divergence = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a batch of sampled responses. A batch's extras hold, for each token:

    - `advantage`;
    - `old_log_probs`, under the policy that the steps of a batch start from;
    - `rollout_log_probs`, as the sampler computed them, if `rollout_bound`;
    - `reference_log_probs`, if `kl`.

    Attributes:
        clip: how far the ratio of new to old probability may fall below 1 and rise above it before
            a token stops to pull; none for no bound.
        ratio_of: each token, or the whole sample (GSPO: the mean over its tokens, in logs).
        aggregation: over all trained tokens of the batch; over each sample's tokens and then over
            samples; or a sum over tokens, over samples times `max_tokens`.
        max_tokens: a constant that `sample-sum` divides by.
        kl: weight of the divergence from the reference policy.
        divergence: its estimator.
        entropy: weight of the entropy, which is to grow.
        rollout_bound: the largest weight, and the inverse of the smallest, of old over rollout
            probability, of what `ratio_of` says: a token, or a sample (the geometric mean over its
            tokens); none to believe the sampler.
        rollout_rule: whether weights beyond are cut to the largest, or their tokens (samples) left
            out.
    """

    clip: tuple[float, float] | None = (0.2, 0.2)
    ratio_of: Literal["token", "sample"] = "token"
    aggregation: Aggregation = "sample-mean"
    max_tokens: int = 1
    kl: float = 0.0
    divergence: Divergence = "k3"
    entropy: float = 0.0
    rollout_bound: float | None = None
    rollout_rule: Literal["truncate", "mask"] = "truncate"

    def __post_init__(self) -> None:
        if self.clip is not None and not (0 <= self.clip[0] < 1 and self.clip[1] >= 0):
            raise UserError(f"clip {self.clip} must be a share below 1 and one above")
        if self.kl and self.divergence == "k1":
            raise UserError(
                "divergence k1 has no gradient on average as a loss: take k2, whose gradient is "
                "that of k1 as a reward, or k3"
            )
        if self.rollout_bound is not None and self.rollout_bound < 1:
            raise UserError(f"rollout_bound {self.rollout_bound} must be at least 1")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} must be at least 1")

    def __call__(self, scores: TokenScores, batch: TokenBatch) -> LossSums:
        mask, extras = batch.loss_mask, batch.extras
        log_probs, advantage = scores.log_probs, extras["advantage"]
        sample = _sample_index(batch)
        ratio = self._ratio(log_probs, extras["old_log_probs"], mask, sample)
        gain = ratio * advantage
        clipped = torch.zeros_like(mask)
        if self.clip is not None:
            bounded = ratio.clamp(1 - self.clip[0], 1 + self.clip[1]) * advantage
            clipped = bounded < gain
            gain = torch.minimum(gain, bounded)
        metrics = {
            "ratio": _metric(ratio, mask),
            "clipped": _metric(clipped, mask),
            "kl_from_old": _metric(kl(log_probs, extras["old_log_probs"], "k3"), mask),
        }
        if self.rollout_bound is not None:
            weight = self._ratio(extras["old_log_probs"], extras["rollout_log_probs"], mask, sample)
            beyond = (weight > self.rollout_bound) | (weight * self.rollout_bound < 1)
            metrics["rollout_weight"] = _metric(weight, mask)
            metrics["rollout_beyond"] = _metric(beyond, mask)
            if self.rollout_rule == "truncate":
                weight = weight.clamp(max=self.rollout_bound)
            else:
                weight = torch.where(beyond, 0, weight)
            gain = gain * weight
        loss = -gain
        if self.kl:
            # Of prompts it may be infinite, and 0 times its gradient is no number.
            own, other = (
                torch.where(mask, values, 0)
                for values in (log_probs, extras["reference_log_probs"])
            )
            divergence = kl(own, other, self.divergence)
            metrics["kl_from_reference"] = _metric(divergence, mask)
            loss = loss + self.kl * divergence
        if scores.entropy is not None:
            metrics["entropy"] = _metric(scores.entropy, mask)
            loss = loss - self.entropy * scores.entropy
        elif self.entropy:
            raise ValueError("the engine was not asked for the entropy")
        return self._aggregate(torch.where(mask, loss, 0), mask, sample, metrics)

    def _ratio(self, log_probs: Tensor, other: Tensor, mask: Tensor, sample: Tensor) -> Tensor:
        """Ratio of two probabilities at each trained token: the token's, or its whole sample's."""
        change = torch.where(mask, log_probs - other, 0)
        if self.ratio_of == "sample":
            mean = _sums(change, sample) / _sums(mask.to(change.dtype), sample).clamp(min=1)
            change = torch.where(mask, mean[sample], 0)
        return change.exp()

    def _aggregate(
        self,
        loss: Tensor,
        mask: Tensor,
        sample: Tensor,
        metrics: Mapping[str, tuple[Tensor, Tensor]],
    ) -> LossSums:
        if self.aggregation == "token-mean":
            return LossSums(loss.sum(), mask.sum(), metrics)
        tokens = _sums(mask.to(loss.dtype), sample)
        samples = (tokens > 0).sum()
        if self.aggregation == "sample-sum":
            return LossSums(loss.sum(), samples * self.max_tokens, metrics)
        return LossSums((_sums(loss, sample) / tokens.clamp(min=1)).sum(), samples, metrics)


# The paper (arXiv 2603.12246) clips GRPO at 0.2 and 0.3, without a divergence.
LOSSES: Mapping[str, PolicyLoss] = MappingProxyType(
    {
        "grpo": PolicyLoss(clip=(0.2, 0.3)),
        # Constant divisor and no standard deviation: neither length nor difficulty weighs.
        "dr-grpo": PolicyLoss(aggregation="sample-sum"),
        "dapo": PolicyLoss(clip=(0.2, 0.28), aggregation="token-mean"),
        # A mean over many tokens moves little: arXiv 2507.18071 bounds it this closely.
        "gspo": PolicyLoss(clip=(3e-4, 4e-4), ratio_of="sample"),
        "rloo": PolicyLoss(clip=None, aggregation="sample-sum"),
        "ppo": PolicyLoss(aggregation="token-mean"),
    }
)


def policy_loss(name: str, **settings: object) -> PolicyLoss:
    """A loss by name, with other settings.

    Raises:
        UserError: there is no such loss.
    """
    if name not in LOSSES:
        raise UserError(f"there is no loss {name!r}; known are {', '.join(LOSSES)}")
    return replace(LOSSES[name], **settings)  # type: ignore[arg-type]


def kl(log_probs: Tensor, other: Tensor, estimator: Divergence) -> Tensor:
    """Estimates of the divergence from another policy, for tokens of the first one.

    Args:
        log_probs, other: of the same tokens, any shape.
        estimator: k1, unbiased, may be negative; k2, half its square; k3, unbiased and never
            negative (http://joschu.net/blog/kl-approx.html).
    """
    change = log_probs - other
    if estimator == "k1":
        return change
    if estimator == "k2":
        return change.square() / 2
    return torch.expm1(-change) + change


def _sample_index(batch: TokenBatch) -> Tensor:
    """Of each token, a number that its sample alone has; padding has one of its own a row."""
    rows, length = batch.samples.shape
    row = torch.arange(rows, device=batch.samples.device).unsqueeze(1)
    return row * (length + 1) + torch.where(batch.samples == PADDING, length, batch.samples)


def _sums(values: Tensor, sample: Tensor) -> Tensor:
    """Sums over samples, at the places of their numbers."""
    rows, length = sample.shape
    zeros = values.new_zeros(rows * (length + 1))
    return zeros.index_add(0, sample.flatten(), values.flatten())


def _metric(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    values = values.detach().float()
    return torch.where(mask, values, 0).sum(), mask.sum()
