"""Estimation of cutoffs by a bank of Kalman filters: thresholds without a decay to choose.

A cutoff is a noisy measurement of a level that drifts while the model learns. A Kalman filter
follows such a level with the least error if it knows two variances:

- of the measurement. The cutoff is an order statistic of N logits, so its variance is
  rate * (1 - rate) / (N * density^2), where the density is that of the logits at the cutoff. It
  follows from the number of logits between the threshold and the cutoff of a step, which training
  counts anyway. Tokens of one text are not independent, which multiplies the variance by an unknown
  factor of 1 or more.
- of the drift, which is unknown and changes: large at first, small at the end.

So several filters run side by side, each with another ratio of the two variances, with and without
a trend. After each step Bayes' rule weights every pair of a filter and a factor by the probability
density that it assigned to the new cutoff. After n steps a share of 1 / (n + 1) of the weights is
spread evenly, so that a filter that was wrong for long can be right again. The estimate is the
weighted mean of the filters' predictions of the next cutoff.

Everything is elementwise over experts, in fp32, and depends on sums over all ranks alone. This
module does not depend on Megatron.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Variances of a step's drift in units of the measurement's: of the level, and of the slope. The
# gain of a filter changes by a factor of 4 from one level to the next and of 2 between slopes.
_LEVEL = tuple(2.0**power for power in (4, 0, -4, -8, -12, -16, -20))
_SLOPE = tuple(2.0**power for power in (0, -4, -8, -12, -16))
_FILTERS = len(_LEVEL) + len(_SLOPE)
# Factors by which measurements may vary more than the order statistic of independent tokens.
_FACTORS = (1.0, 2.0, 4.0, 8.0)
# Number of tokens between threshold and cutoff over which the density is averaged; its relative
# error is about the root of the inverse.
_DENSITY_TOKENS = 256.0


class FilterBank(NamedTuple):
    """State of the filters of one layer, fp32.

    Variances are in units of the measurement's.

    Attributes:
        level: `[filters, experts]`, estimated cutoff.
        slope: `[filters, experts]`, estimated change of the cutoff in a step; 0 without trend.
        level_variance: `[filters, experts]`, variance of the level's error.
        covariance: `[filters, experts]`, covariance of the errors of level and slope.
        slope_variance: `[filters, experts]`, variance of the slope's error.
        weight: `[factors * filters, experts]`, probability of each pair.
        distance: `[1, experts]`, sum of the distances between threshold and cutoff, in logits.
        tokens: `[1, experts]`, number of tokens between threshold and cutoff, in the same steps.
        age: `[1, experts]`, number of cutoffs so far; 0 if the other values have no meaning yet.
    """

    level: Tensor
    slope: Tensor
    level_variance: Tensor
    covariance: Tensor
    slope_variance: Tensor
    weight: Tensor
    distance: Tensor
    tokens: Tensor
    age: Tensor


_ROWS = (*(_FILTERS,) * 5, len(_FACTORS) * _FILTERS, 1, 1, 1)
ROWS = sum(_ROWS)
"""Number of rows of the state of one layer, `[ROWS, experts]`."""


class StepCounts(NamedTuple):
    """Numbers of tokens of a step, over all ranks and micro-batches.

    Attributes:
        above: int64 `[experts]`, logits above the threshold with which the step began.
        k: Number of tokens that an expert takes on average.
        tokens: Number of tokens.
    """

    above: Tensor
    k: int
    tokens: int


def start(level: Tensor) -> Tensor:
    """Return the state after one cutoff for each expert.

    Args:
        level: fp32 `[experts]`, the cutoffs.

    Returns:
        fp32 `[ROWS, experts]`.
    """
    _, slope_noise = _noise(level)
    ones = torch.ones_like(slope_noise) * torch.ones_like(level)
    zeros = torch.zeros_like(ones)
    weight = torch.full_like(ones, 1.0 / (len(_FACTORS) * _FILTERS)).repeat(len(_FACTORS), 1)
    bank = FilterBank(
        ones * level, zeros, ones, zeros, ones * slope_noise,
        weight, zeros[:1], zeros[:1], ones[:1],
    )  # fmt: skip
    return torch.cat(bank)


def predict(state: Tensor) -> Tensor:
    """Return the estimate of the next cutoffs.

    Args:
        state: fp32 `[ROWS, experts]`.

    Returns:
        fp32 `[experts]`.
    """
    bank = _unpack(state)
    share = bank.weight.view(len(_FACTORS), _FILTERS, -1).sum(dim=0)
    return (share * (bank.level + bank.slope)).sum(dim=0)


def update(state: Tensor, cutoffs: Tensor, counts: StepCounts | None = None) -> Tensor:
    """Return the state after the cutoffs of another step.

    An expert without a finite cutoff keeps its state; its first cutoff starts its filters.

    Args:
        state: fp32 `[ROWS, experts]`.
        cutoffs: fp32 `[experts]`.
        counts: Counts of the step, or None if the thresholds were not those of the filters: then
            the filters move and their weights do not.

    Returns:
        fp32 `[ROWS, experts]`.
    """
    present = cutoffs.isfinite()
    measured = torch.where(present, cutoffs, 0.0)
    bank = _unpack(state)
    age = bank.age
    if counts is not None:
        bank = _weigh(bank, measured, predict(state), counts)
    moved = torch.cat(_move(bank, measured)._replace(age=age + 1.0))
    moved = torch.where(age == 0, start(measured), moved)
    return torch.where(present, moved, state)


def _noise(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances of a step's drift of level and slope, `[filters, 1]` each."""
    level = like.new_tensor([*_LEVEL, *(0.0 for _ in _SLOPE)]).unsqueeze(1)
    slope = like.new_tensor([*(0.0 for _ in _LEVEL), *_SLOPE]).unsqueeze(1)
    return level, slope


def _unpack(state: Tensor) -> FilterBank:
    return FilterBank(*state.split(_ROWS))


def _predicted_variance(bank: FilterBank) -> tuple[Tensor, Tensor, Tensor]:
    """Return variance of the level, covariance and variance of the slope at the next step."""
    level_noise, slope_noise = _noise(bank.level)
    level = bank.level_variance + 2 * bank.covariance + bank.slope_variance + level_noise
    return level, bank.covariance + bank.slope_variance, bank.slope_variance + slope_noise


def _weigh(bank: FilterBank, measured: Tensor, threshold: Tensor, counts: StepCounts) -> FilterBank:
    """Update the density of logits and the weights by the innovations of a step."""
    k, rate = float(counts.k), counts.k / counts.tokens
    distance = bank.distance + (measured - threshold).abs()
    tokens = bank.tokens + (counts.above - counts.k).abs().to(measured.dtype)
    # Memory ends by the precision that it gives, not by a number of steps.
    halve = torch.where(tokens > _DENSITY_TOKENS, 0.5, 1.0)
    distance, tokens = distance * halve, tokens * halve
    # rate (1 - rate) / (N density^2), for the density tokens / (N distance)
    variance = k * (1.0 - rate) * (distance / tokens) ** 2

    factors = measured.new_tensor(_FACTORS).view(-1, 1, 1)
    spread = factors * (1.0 + _predicted_variance(bank)[0])  # [factors, filters, experts]
    innovation = measured - (bank.level + bank.slope)
    surprise = innovation**2 / (variance * spread) + spread.log()
    likelihood = (-0.5 * (surprise - surprise.amin(dim=(0, 1)))).exp()
    weight = bank.weight * likelihood.flatten(0, 1)
    weight = weight / weight.sum(dim=0)
    share = 1.0 / (bank.age + 1.0)
    weight = (1.0 - share) * weight + share / len(weight)
    known = (tokens > 0) & (distance > 0)
    return bank._replace(
        weight=torch.where(known, weight, bank.weight), distance=distance, tokens=tokens
    )


def _move(bank: FilterBank, measured: Tensor) -> FilterBank:
    """Take one step of every filter."""
    level_variance, covariance, slope_variance = _predicted_variance(bank)
    predicted = bank.level + bank.slope
    innovation = measured - predicted
    gain = level_variance / (level_variance + 1.0)
    slope_gain = covariance / (level_variance + 1.0)
    return bank._replace(
        level=predicted + gain * innovation,
        slope=bank.slope + slope_gain * innovation,
        level_variance=gain,  # (1 - gain) * variance, in units of the measurement's
        covariance=(1.0 - gain) * covariance,
        slope_variance=slope_variance - slope_gain * covariance,
    )
