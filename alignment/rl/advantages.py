"""Advantages of sampled responses, computed from their rewards in fp64.

A response without a verdict has no reward, which is None here and never 0. It stays out of the
statistics of its group, and its advantage is 0.

Rewards that differ by no more than their rounding error are equal. A group of equal rewards has no
advantages under any algorithm, as a division by their standard deviation would turn rounding into
advantages of 1. Errors are absolute here, in the unit of the rewards.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.rounding import EXACT, Floats, is_constant, tolerance

Rewards = Sequence[float | None]


def standardized(rewards: Floats) -> Floats:
    """Return the distance from the group's mean, in its standard deviations (n - 1), as in GRPO.

    The rounding error is assumed to be that of fp64; `group_advantages` handles larger errors.
    """
    if is_constant(rewards, EXACT):
        return np.zeros_like(rewards)
    units = rewards / np.abs(rewards).max()  # squares of tiny rewards would be 0
    return np.asarray(centered(units) / units.std(ddof=1))


def centered(rewards: Floats) -> Floats:
    """Return the distance from the group's mean, as in Dr. GRPO (arXiv 2503.20783)."""
    return rewards - rewards.mean()


def leave_one_out(rewards: Floats) -> Floats:
    """Return the distance from the mean of the other rewards, as in RLOO (arXiv 2402.14740)."""
    count = len(rewards)
    return rewards - (rewards.sum() - rewards) / (count - 1)


def group_advantages(
    rewards: Rewards,
    groups: Sequence[Hashable],
    of_group: Callable[[Floats], Floats] = standardized,
    errors: Sequence[float | None] | None = None,
) -> Floats:
    """Return the advantages of all responses within the groups of their prompts.

    Args:
        rewards: Rewards, `[responses]`.
        groups: Group of each response, `[responses]`.
        of_group: Function that computes the advantages of two or more rewards of a group.
        errors: Rounding error of each reward, `[responses]`. 0 for one that is exact, None for the
            error of a score computed in fp32.

    Returns:
        Advantages, `[responses]`. 0 where there is no reward, no other one in the group, or no
        reward in the group that differs from another by more than rounding.

    Raises:
        ValueError: A reward is not finite.
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
    """Return which responses dynamic sampling selects, as in DAPO (arXiv 2503.14476).

    Args:
        rewards: Rewards before penalties, which could make equal rewards differ, `[responses]`.
        groups: Group of each response, `[responses]`.
        errors: Rounding error of each reward; see `group_advantages`.

    Returns:
        bool `[responses]`, True for groups in which two rewards differ by more than rounding.
    """
    selected = {
        group: _differ(members, rewards, errors)
        for group, members in _members(rewards, groups).items()
    }
    return np.array([selected.get(group, False) for group in groups], dtype=bool)


def _differ(
    members: Sequence[int], rewards: Rewards, errors: Sequence[float | None] | None
) -> bool:
    """Return whether two rewards of a group differ by more than rounding."""
    values = _floats([rewards[member] for member in members])
    member_errors = [None if errors is None else errors[member] for member in members]
    unknown = [value for value, error in zip(values, member_errors) if error is None]
    least = max(
        tolerance(values, EXACT),
        tolerance(unknown),
        *(error for error in member_errors if error),
        0.0,
    )
    return float(np.ptp(values)) > least


def overlong_penalty(lengths: Sequence[int], limit: int, margin: int) -> Floats:
    """Return DAPO's soft penalty of long responses, which is added to rewards.

    Args:
        lengths: Lengths of the responses, in tokens.
        limit: Length from which the penalty is -1.
        margin: Tokens before the limit over which the penalty falls from 0.

    Raises:
        ValueError: The margin is not within the limit.
    """
    if not 0 < margin <= limit:
        raise ValueError(f"The margin {margin} must be above 0 and at most the limit {limit}.")
    return np.clip((limit - margin - np.asarray(lengths, dtype=np.float64)) / margin, -1, 0)


def generalized_advantages(
    rewards: Floats, values: Floats, discount: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Floats, Floats]:
    """Return generalized advantages (arXiv 1506.02438) over one response that ends.

    Args:
        rewards: Reward of each token, `[tokens]`.
        values: Expected return before each token, `[tokens]`.
        discount: Discount of later rewards, gamma.
        gae_lambda: Decay of the estimator, lambda.

    Returns:
        Advantages and returns, `[tokens]` each. Returns are the targets of the values.
    """
    advantages = np.zeros(len(rewards))
    later = after = 0.0
    for token in reversed(range(len(rewards))):
        error = rewards[token] + discount * after - values[token]
        later = error + discount * gae_lambda * later
        advantages[token], after = later, float(values[token])
    return advantages, advantages + values


def _members(rewards: Rewards, groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Return the indices of the rewarded responses of each group."""
    if len(rewards) != len(groups):
        raise ValueError(f"There are {len(rewards)} rewards of {len(groups)} responses.")
    members: dict[Hashable, list[int]] = {}
    for place, (reward, group) in enumerate(zip(rewards, groups)):
        if reward is not None:
            if not np.isfinite(reward):
                raise ValueError(f"The reward of response {place} is {reward}.")
            members.setdefault(group, []).append(place)
    return members


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array(values, dtype=np.float64)
