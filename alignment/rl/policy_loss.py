"""Clipped policy-gradient loss, with settings for the differences between algorithms.

The settings choose the probabilities of the ratio, its bounds, the mean over tokens, and the
divergence from a reference policy. The advantages contain everything that depends on rewards only.
"""

from dataclasses import dataclass, replace
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
    """Loss of a batch of sampled responses.

    It reads these extras of each token:

    - `advantage`;
    - `old_log_probs`, of the policy that the optimizer steps of a step start from. If they are
      missing, the loss takes those of the training pass itself, as the policy has not moved yet,
      and reports how far the sampler's are from them (`rollout_gap`, `rollout_kl`,
      `rollout_gap_max`);
    - `rollout_log_probs`, of the sampler, if `rollout_bound` is set;
    - `reference_log_probs`, if `kl` is set.

    Attributes:
        clip: Distances below and above 1 at which the ratio of new to old probability is clipped,
            so that the token has no gradient. None for no bound.
        ratio_of: "token", or "sample" for the geometric mean over the tokens of a response (GSPO).
        aggregation: "token-mean" averages over all trained tokens of the batch, "sample-mean" over
            the tokens of each response and then over responses, and "sample-sum" divides the sum
            over tokens by responses times `max_tokens`.
        max_tokens: Constant that "sample-sum" divides by.
        kl: Weight of the divergence from the reference policy.
        divergence: Estimator of that divergence.
        entropy: Weight of the entropy bonus.
        rollout_bound: Largest weight of old over rollout probability, and the inverse of the
            smallest. The weight is that of a token or of a sample, according to `ratio_of`. None
            leaves the weights out.
        rollout_rule: Whether to "truncate" weights beyond the bound to the largest one, or to
            "mask" their tokens or samples.
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
        """Check the settings.

        Raises:
            UserError: A setting is out of its range.
        """
        if self.clip is not None and not (0 <= self.clip[0] < 1 and self.clip[1] >= 0):
            raise UserError(f"clip {self.clip} must be a share below 1 and one above 0.")
        if self.kl and self.divergence == "k1":
            raise UserError(
                "The divergence k1 has no gradient on average as a loss. Choose k2, whose gradient "
                "is that of k1 as a reward, or k3."
            )
        if self.rollout_bound is not None and self.rollout_bound < 1:
            raise UserError(f"rollout_bound {self.rollout_bound} must be at least 1.")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} must be at least 1.")

    @property
    def derives_old_log_probs(self) -> bool:
        """Return True: missing `old_log_probs` are taken from the training pass."""
        return True

    @property
    def uses_reference(self) -> bool:
        """Return whether the loss reads `reference_log_probs`."""
        return bool(self.kl)

    @property
    def uses_entropy(self) -> bool:
        """Return whether the loss reads the entropy."""
        return bool(self.entropy)

    def __call__(self, scores: TokenScores, batch: TokenBatch) -> LossSums:
        """Return the sum of the loss over the trained tokens, its weight, and metrics."""
        mask, extras = batch.loss_mask, batch.extras
        log_probs, advantage = scores.log_probs, extras["advantage"]
        old = extras.get("old_log_probs", log_probs.detach())
        sample = _sample_index(batch)
        ratio = self._ratio(log_probs, old, mask, sample)
        gain = ratio * advantage
        clipped = torch.zeros_like(mask)
        if self.clip is not None:
            bounded = ratio.clamp(1 - self.clip[0], 1 + self.clip[1]) * advantage
            clipped = bounded < gain
            gain = torch.minimum(gain, bounded)
        metrics = {
            "ratio": _metric(ratio, mask),
            "clipped": _metric(clipped, mask),
            "kl_from_old": _metric(kl(log_probs, old, "k3"), mask),
        }
        maxima = {}
        if "old_log_probs" not in extras and "rollout_log_probs" in extras:
            gap = torch.where(mask, extras["rollout_log_probs"] - old, 0)
            metrics["rollout_gap"] = _metric(gap.abs(), mask)
            metrics["rollout_kl"] = _metric(gap, mask)
            maxima["rollout_gap_max"] = gap.abs().max()
        if self.rollout_bound is not None:
            weight = self._ratio(old, extras["rollout_log_probs"], mask, sample)
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
            # On prompt tokens the divergence may be infinite, and 0 times its gradient is NaN.
            policy, other = (
                torch.where(mask, values, 0)
                for values in (log_probs, extras["reference_log_probs"])
            )
            divergence = kl(policy, other, self.divergence)
            metrics["kl_from_reference"] = _metric(divergence, mask)
            loss = loss + self.kl * divergence
        if scores.entropy is not None:
            metrics["entropy"] = _metric(scores.entropy, mask)
            loss = loss - self.entropy * scores.entropy
        elif self.entropy:
            raise ValueError("The loss uses the entropy, but the engine did not compute it.")
        sums = self._aggregate(torch.where(mask, loss, 0), mask, sample)
        return replace(sums, metrics=metrics, maxima=maxima)

    def _ratio(self, log_probs: Tensor, other: Tensor, mask: Tensor, sample: Tensor) -> Tensor:
        """Return the ratio of two probabilities at each trained token, by token or by sample."""
        change = torch.where(mask, log_probs - other, 0)
        if self.ratio_of == "sample":
            mean = _sums(change, sample) / _sums(mask.to(change.dtype), sample).clamp(min=1)
            change = torch.where(mask, mean[sample], 0)
        return change.exp()

    def _aggregate(self, loss: Tensor, mask: Tensor, sample: Tensor) -> LossSums:
        if self.aggregation == "token-mean":
            return LossSums(loss.sum(), mask.sum())
        tokens = _sums(mask.to(loss.dtype), sample)
        samples = (tokens > 0).sum()
        if self.aggregation == "sample-sum":
            return LossSums(loss.sum(), samples * self.max_tokens)
        return LossSums((_sums(loss, sample) / tokens.clamp(min=1)).sum(), samples)


def kl(log_probs: Tensor, other: Tensor, estimator: Divergence) -> Tensor:
    """Return estimates of the divergence from another policy, for tokens of the first one.

    Args:
        log_probs: Log-probabilities under the first policy, any shape.
        other: Log-probabilities of the same tokens under the other policy.
        estimator: "k1" is unbiased and may be negative, "k2" is half its square, "k3" is unbiased
            and never negative (http://joschu.net/blog/kl-approx.html).
    """
    change = log_probs - other
    if estimator == "k1":
        return change
    if estimator == "k2":
        return change.square() / 2
    return torch.expm1(-change) + change


def _sample_index(batch: TokenBatch) -> Tensor:
    """Return the number of each token's sample, unique in the batch; padding has one per row."""
    rows, length = batch.samples.shape
    row = torch.arange(rows, device=batch.samples.device).unsqueeze(1)
    return row * (length + 1) + torch.where(batch.samples == PADDING, length, batch.samples)


def _sums(values: Tensor, sample: Tensor) -> Tensor:
    """Return sums over the tokens of each sample, indexed by the samples' numbers."""
    rows, length = sample.shape
    zeros = values.new_zeros(rows * (length + 1))
    return zeros.index_add(0, sample.flatten(), values.flatten())


def _metric(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    values = values.detach().float()
    return torch.where(mask, values, 0).sum(), mask.sum()
