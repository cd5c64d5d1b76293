"""Advantages of sampled responses from their rewards, in fp64.

A response whose judge gave no score has no reward, which is None here and never 0: it stays out of
its group's statistics, and its advantage is 0.

Rewards that differ by no more than their rounding error are equal: a group of them has no
advantages, whichever the algorithm, as a division by their spread would turn rounding into
advantages of 1. Errors are absolute here, in the unit of the rewards.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.rounding import EXACT, Floats, is_constant, tolerance

Rewards = Sequence[float | None]


def standardized(rewards: Floats) -> Floats:
    """GRPO: distance from the group's mean, in its standard deviations (of a sample, n - 1).

    The error of the rewards is that of fp64 arithmetic; `group_advantages` handles larger ones.
    """
    if is_constant(rewards, EXACT):
        return np.zeros_like(rewards)
    units = rewards / np.abs(rewards).max()  # squares of tiny rewards would be 0
    return np.asarray(centered(units) / units.std(ddof=1))


def centered(rewards: Floats) -> Floats:
    """Dr. GRPO (arXiv 2503.20783): from the group's mean; how hard a prompt is does not weigh."""
    return rewards - rewards.mean()


def leave_one_out(rewards: Floats) -> Floats:
    """RLOO (arXiv 2402.14740): from the mean of the others of the group."""
    count = len(rewards)
    return rewards - (rewards.sum() - rewards) / (count - 1)


def group_advantages(
    rewards: Rewards,
    groups: Sequence[Hashable],
    of_group: Callable[[Floats], Floats] = standardized,
    errors: Sequence[float | None] | None = None,
) -> Floats:
    """Advantages of all responses within the groups of their prompts.

    Args:
        rewards: `[responses]`.
        groups: of each response, what it shares with the others of its prompt.
        of_group: of two or more rewards of a group.
        errors: `[responses]`, rounding error of each reward, 0 for one that is exact; None for
            that of a score computed in fp32.

    Returns:
        `[responses]`; 0 where there is no reward, no other in the group to compare it with, or no
        reward in the group that differs from another by more than rounding.

    Raises:
        ValueError: a reward is not finite.
    """
    advantages = np.zeros(len(rewards))
    for members in _members(rewards, groups).values():
        if len(members) > 1 and _differ(members, rewards, errors):
            advantages[members] = of_group(_floats([rewards[member] for member in members]))
    return advantages


def informative(
    rewards: Rewards,
    groups: Sequence[Hashable],
    errors: Sequence[float | None] | None = None,
) -> NDArray[np.bool_]:
    """DAPO's dynamic sampling (arXiv 2503.14476): which responses are of groups to keep.

    Args:
        rewards: raw, before any shaping, which could part equal ones.
        errors: see `group_advantages`.

    Returns:
        `[responses]`; a group is kept when two of its rewards differ by more than rounding.
    """
    keep = {
        group: _differ(members, rewards, errors)
        for group, members in _members(rewards, groups).items()
    }
    return np.array([keep.get(group, False) for group in groups], dtype=bool)


def _differ(
    members: Sequence[int], rewards: Rewards, errors: Sequence[float | None] | None
) -> bool:
    """Whether two of a group's rewards differ by more than rounding."""
    values = _floats([rewards[member] for member in members])
    known = [None if errors is None else errors[member] for member in members]
    unknown = [value for value, error in zip(values, known) if error is None]
    least = max(
        tolerance(values, EXACT), tolerance(unknown), *(error for error in known if error), 0.0
    )
    return float(np.ptp(values)) > least


def overlong_penalty(lengths: Sequence[int], limit: int, margin: int) -> Floats:
    """DAPO's soft punishment of long responses, to be added to rewards.

    Args:
        lengths: of the responses, in tokens.
        limit: from which on it is -1.
        margin: tokens before the limit over which it falls from 0.

    Raises:
        ValueError: the margin is not within the limit.
    """
    if not 0 < margin <= limit:
        raise ValueError(f"margin {margin} must be above 0 and at most the limit {limit}")
    return np.clip((limit - margin - np.asarray(lengths, dtype=np.float64)) / margin, -1, 0)


def generalized_advantages(
    rewards: Floats, values: Floats, discount: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Floats, Floats]:
    """GAE (arXiv 1506.02438) over one response that ends.

    Args:
        rewards: `[tokens]`, of each action.
        values: `[tokens]`, expected return before each action.
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        Advantages and returns (what values should have been), `[tokens]` each.
    """
    advantages = np.zeros(len(rewards))
    later = after = 0.0
    for token in reversed(range(len(rewards))):
        error = rewards[token] + discount * after - values[token]
        later = error + discount * gae_lambda * later
        advantages[token], after = later, float(values[token])
    return advantages, advantages + values


def _members(rewards: Rewards, groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Places of the rewarded responses of each group."""
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards of {len(groups)} responses")
    members: dict[Hashable, list[int]] = {}
    for place, (reward, group) in enumerate(zip(rewards, groups)):
        if reward is not None:
            if not np.isfinite(reward):
                raise ValueError(f"the reward of response {place} is {reward}")
            members.setdefault(group, []).append(place)
    return members


def _floats(given: Sequence[float | None]) -> Floats:
    return np.array(given, dtype=np.float64)
