"""Advantages of sampled responses from their rewards, in fp64.

A response whose judge gave no score has no reward, which is None here and never 0: it stays out of
its group's statistics, and its advantage is 0.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rewards = Sequence[float | None]


def standardized(rewards: Floats) -> Floats:
    """GRPO: from the group's mean, in its standard deviations (of a sample, n - 1)."""
    spread = rewards.std(ddof=1)
    # Of equal rewards rounding can leave a spread, which would blow rounding up to advantages.
    if spread <= 1e-9 * max(1.0, float(np.abs(rewards).max())):
        return np.zeros_like(rewards)
    return np.asarray(centered(rewards) / spread)


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
) -> Floats:
    """Advantages of all responses within the groups of their prompts.

    Args:
        rewards: `[responses]`.
        groups: of each response, what it shares with the others of its prompt.
        of_group: of two or more rewards of a group.

    Returns:
        `[responses]`; 0 where there is no reward, or no other in the group to compare it with.

    Raises:
        ValueError: a reward is not finite.
    """
    advantages = np.zeros(len(rewards))
    for members in _members(rewards, groups).values():
        if len(members) > 1:
            advantages[members] = of_group(_floats([rewards[member] for member in members]))
    return advantages


def informative(rewards: Rewards, groups: Sequence[Hashable]) -> NDArray[np.bool_]:
    """DAPO's dynamic sampling (arXiv 2503.14476): which responses are of groups to keep.

    Args:
        rewards: raw, before any shaping, which could part equal ones.

    Returns:
        `[responses]`; a group is kept when two of its rewards differ.
    """
    keep = {
        group: len({rewards[member] for member in members}) > 1
        for group, members in _members(rewards, groups).items()
    }
    return np.array([keep.get(group, False) for group in groups], dtype=bool)


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
    rewards: Floats, values: Floats, discount: float = 1.0, trace: float = 1.0
) -> tuple[Floats, Floats]:
    """GAE (arXiv 1506.02438) over one response that ends.

    Args:
        rewards: `[tokens]`, of each action.
        values: `[tokens]`, expected return before each action.
        discount: gamma.
        trace: lambda.

    Returns:
        Advantages and returns (what values should have been), `[tokens]` each.
    """
    advantages = np.zeros(len(rewards))
    later = after = 0.0
    for token in reversed(range(len(rewards))):
        error = rewards[token] + discount * after - values[token]
        later = error + discount * trace * later
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
