"""Packing of a step's responses into the batches of its optimizer steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.engines.balancing import pack
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import all_gather_by_data_rank
from alignment.rl.advantages import group_advantages, overlong_penalty
from alignment.rl.rollouts import RewardResult, Rollout, RolloutGroup
from alignment.rl.tasks import RLSettings


def mini_batches(
    engine: AlignmentEngine,
    settings: RLSettings,
    groups: Sequence[RolloutGroup],
    seed: tuple[int, ...],
) -> list[TokenBatch]:
    """Pack this rank's responses of each mini-batch, with their advantages or rewards.

    A response without a reward, or that the filter removes, is in no mini-batch. If a critic
    computes the advantages, tokens have an extra `reward` but no `advantage` yet.

    Args:
        engine: Engine that is trained. Responses move between its data-parallel ranks where that
            balances the tokens per rank.
        settings: Settings of reinforcement learning.
        groups: This rank's groups of the step.
        seed: Seed of the assignment of responses to mini-batches.
    """
    compute_advantages = settings.algorithm.advantages
    numbers = group_numbers(engine, groups)
    count = settings.groups * settings.group_size
    order = np.random.default_rng(seed).permutation(count)
    parts: list[list[TokenSample]] = [[] for _ in range(settings.mini_batches)]
    for group, number in zip(groups, numbers):
        task, rollouts, results = group
        rewards = shaped_rewards(settings, rollouts, results)
        if settings.rollout_filter is not None:
            keep = settings.rollout_filter(group)
            rewards = [
                reward if selected else None for reward, selected in zip(rewards, keep, strict=True)
            ]
        if compute_advantages is None:
            name, values = "reward", [0.0 if reward is None else reward for reward in rewards]
        else:
            errors = [result.error for result in results]
            one_group = [0] * len(rewards)
            advantages = group_advantages(rewards, one_group, compute_advantages, errors)
            name, values = "advantage", advantages.tolist()
        for rollout, reward, value in zip(rollouts, rewards, values):
            if reward is None or not rollout.tokens:
                continue
            extras: dict[str, Any] = {
                name: value,
                "rollout_log_probs": [*[0.0] * len(task.prompt), *rollout.log_probs],
            }
            tokens = [*task.prompt, *rollout.tokens]
            place = order[number * settings.group_size + rollout.sample]
            parts[place % len(parts)].append(TokenSample(tokens, len(task.prompt), extras))
    return [pack(engine, samples, settings.seq_length) for samples in parts]


def group_numbers(engine: AlignmentEngine, groups: Sequence[RolloutGroup]) -> list[int]:
    """Return each group's index among the groups of all ranks, the same on every layout."""
    ids = [group.task.id for group in groups]
    all_ids = sorted(i for share in all_gather_by_data_rank(engine, ids) for i in share)
    places = {task: place for place, task in enumerate(all_ids)}
    return [places[task] for task in ids]


def shaped_rewards(
    settings: RLSettings, rollouts: Sequence[Rollout], results: Sequence[RewardResult]
) -> list[float | None]:
    """Return the rewards of a group, with the penalty of long responses if the algorithm has it."""
    rewards = [result.reward for result in results]
    if not settings.algorithm.overlong:
        return rewards
    lengths = [len(rollout.tokens) for rollout in rollouts]
    limit = settings.sampling.max_new_tokens
    penalties = overlong_penalty(lengths, limit, settings.overlong_margin)
    return [None if r is None else r + float(p) for r, p in zip(rewards, penalties)]
