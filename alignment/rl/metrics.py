"""Metrics of a step, of its responses and its optimizer steps, the same on every rank."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine, StepResult
from alignment.ranks import all_gather_by_data_rank
from alignment.records import Prompt
from alignment.rl.advantages import informative
from alignment.rl.rollouts import RewardResult, Rollout, RolloutGroup
from alignment.rl.tasks import PromptTask

ResponseMetric = Callable[[PromptTask, Rollout, RewardResult], float]

RESPONSE_METRICS: dict[str, ResponseMetric] = {
    "length": lambda task, rollout, reward: len(rollout.tokens),
    "cut_off": lambda task, rollout, reward: not rollout.ended,
}
"""Metrics that are logged as means over the responses of a step on all ranks, by name."""


def response_metrics(engine: AlignmentEngine, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Return metrics of the responses of all ranks, before the step; a collective."""
    rows: list[tuple[Any, ...]] = [
        (
            reward.reward,
            len(rollout.tokens) + len(task.prompt),
            engine.step - rollout.version,
            *(float(metric(task, rollout, reward)) for metric in RESPONSE_METRICS.values()),
        )
        for task, rollouts, rewards in groups
        for rollout, reward in zip(rollouts, rewards)
    ]
    sampled = [p for _, rollouts, _ in groups for r in rollouts for p in r.log_probs]
    differ = [rewards_differ(group) for group in groups]
    components = [
        reward.details.get("components", {}) for _, _, rewards in groups for reward in rewards
    ]
    surprise = (-float(np.sum(sampled)), len(sampled))
    shares = all_gather_by_data_rank(engine, (rows, differ, components, surprise))
    rows = [row for share in shares for row in share[0]]
    differ = [one for share in shares for one in share[1]]
    surprises, counts = zip(*(share[3] for share in shares))
    known_rewards = [row[0] for row in rows if row[0] is not None]
    count = max(1, len(rows))
    return {
        "reward": float(np.mean(known_rewards)) if known_rewards else None,
        "reward_std": float(np.std(known_rewards)) if known_rewards else None,
        **{
            name: float(np.mean([row[place] for row in rows])) if rows else 0.0
            for place, name in enumerate(RESPONSE_METRICS, start=3)
        },
        # The mean surprise of sampled tokens estimates the entropy of their distribution. A loss
        # that has an entropy replaces it by the exact one.
        "entropy": sum(surprises) / max(1, sum(counts)),
        **component_means([one for share in shares for one in share[2]], "component"),
        "groups_that_differ": sum(differ) / max(1, len(differ)),
        "rollout_staleness": sum(row[2] for row in rows) / count,
        "tokens": sum(row[1] for row in rows),
    }


def component_means(components: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Return the mean score of each component over the responses that have one.

    Args:
        components: Scores of each response by component.
        prefix: Prefix of the names of the metrics.
    """
    by_name: dict[str, list[float]] = {}
    for scores in components:
        for name, score in scores.items():
            by_name.setdefault(name, []).append(score)
    means = {name: float(np.mean(values)) for name, values in sorted(by_name.items())}
    return {f"{prefix}/{name}": mean for name, mean in means.items()}


def sample_text(groups: Sequence[RolloutGroup], max_prompts: int = 4) -> str:
    """Return some responses of a step with their rewards, one of each prompt, in Markdown."""
    parts = []
    for task, rollouts, rewards in groups[:max_prompts]:
        prompt, response, result = task.metadata, rollouts[0], rewards[0]
        parts.append(
            f"**{task.id}**: reward {'none' if result.reward is None else f'{result.reward:.3f}'}, "
            f"{len(response.tokens):,} tokens{'' if response.ended else ', cut off'}"
        )
        if isinstance(prompt, Prompt):
            parts += [f"    {message.role}: {message.content}" for message in prompt.messages]
        parts.append("\n".join(f"    {line}" for line in result.text.splitlines()))
    return "\n\n".join(parts)


def failure_metrics(
    engine: AlignmentEngine, groups: Sequence[RolloutGroup]
) -> tuple[dict[str, float], Counter[str]]:
    """Return shares of the responses of all ranks without a reward, and counts of the reasons.

    A collective.

    Args:
        engine: Engine whose ranks share the responses.
        groups: All sampled groups, including those on which the step does not train.
    """
    local_rows = [
        (
            reward.reward is None,
            reward.outcome,
            tuple(reward.details.get("reasons", ())) if reward.reward is None else (),
        )
        for _, _, rewards in groups
        for reward in rewards
    ]
    rows = [row for share in all_gather_by_data_rank(engine, local_rows) for row in share]
    count = max(1, len(rows))
    shares = {
        "unrewarded": sum(row[0] for row in rows) / count,
        "unparseable": sum(row[1] == "unparseable" for row in rows) / count,
        "failed": sum(row[1] == "failed" for row in rows) / count,
    }
    return shares, Counter(reason for row in rows for reason in row[2])


def rewards_differ(group: RolloutGroup) -> bool:
    """Return whether two rewards of a group differ by more than rounding."""
    rewards, errors = [w.reward for w in group.rewards], [w.error for w in group.rewards]
    return bool(informative(rewards, [0] * len(rewards), errors).any())


def rollout_gap(engine: AlignmentEngine, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Compare the sampler's log-probabilities with those of training; a collective.

    Args:
        engine: Engine whose ranks share the batches.
        batches: Batches with the extras `rollout_log_probs` and `old_log_probs`.

    Returns:
        In nats per token: the mean distance, the largest distance, and the mean excess of the
        sampler's log-probabilities (`rollout_kl`), which estimates the divergence of the sampler
        from the policy.
    """
    differences = [
        (batch.extras["rollout_log_probs"] - batch.extras["old_log_probs"])[batch.loss_mask]
        for batch in batches
        if batch.rows
    ]
    local = torch.cat([torch.zeros(0), *differences]).double()
    largest = float(local.abs().max()) if len(local) else 0.0
    values = (float(local.abs().sum()), float(local.sum()), len(local), largest)
    shares = all_gather_by_data_rank(engine, values)
    count = max(1, sum(share[2] for share in shares))
    return {
        "rollout_gap": sum(share[0] for share in shares) / count,
        "rollout_kl": sum(share[1] for share in shares) / count,
        "rollout_gap_max": max(share[3] for share in shares),
    }


def update_metrics(results: Sequence[StepResult], prefix: str = "") -> dict[str, float]:
    """Return the mean metrics of the optimizer steps of one step.

    An optimizer step that was skipped because fp16 gradients overflowed has no gradient norm. Such
    steps are counted as `overflows`.
    """
    if not results:
        return {}
    means = {n: float(np.mean([r.metrics[n] for r in results])) for n in results[0].metrics}
    norms = [r.grad_norm for r in results if r.grad_norm is not None]
    metrics = {f"{prefix}loss": float(np.mean([r.loss for r in results]))}
    if norms:
        metrics[f"{prefix}grad_norm"] = float(np.mean(norms))
    if len(norms) < len(results):
        metrics[f"{prefix}overflows"] = float(len(results) - len(norms))
    return {**metrics, f"{prefix}lr": results[-1].lr, **means}


class StepTimes:
    """Stopwatch of the parts of one step, in seconds."""

    def __init__(self) -> None:
        """Start the clock of the step."""
        self._begin = time.perf_counter()
        self._parts = {"rollout": 0.0, "judging": 0.0, "training": 0.0}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the duration of a block to a part."""
        begin = time.perf_counter()
        yield
        self._parts[part] += time.perf_counter() - begin

    def metrics(self, tokens: float) -> Mapping[str, float]:
        """Return the seconds of the step and of its parts, their shares, and tokens per second."""
        total = time.perf_counter() - self._begin
        return {
            **{f"time/{part}": seconds for part, seconds in self._parts.items()},
            **{f"share/{part}": seconds / total for part, seconds in self._parts.items()},
            "tokens_per_s": tokens / total,
            "seconds": total,
        }
