"""Figures of a step: of its responses, of its optimizer steps; the same on every rank."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.engines.batch import Batch
from alignment.engines.protocol import Engine, StepResult
from alignment.ranks import shares_of
from alignment.rl.advantages import informative
from alignment.rl.tasks import Group


def facts_of(engine: Engine, groups: Sequence[Group]) -> dict[str, Any]:
    """Of the responses of all ranks, before the step; a collective."""
    flat = [
        (w.reward, len(r.tokens), r.ended, len(task.prompt), engine.step - r.version)
        for task, rollouts, rewards in groups
        for r, w in zip(rollouts, rewards)
    ]
    rows = [row for share in shares_of(engine, flat) for row in share]
    told = [d for share in shares_of(engine, list(map(differ, groups))) for d in share]
    rewards_ = [row[0] for row in rows if row[0] is not None]
    count = max(1, len(rows))
    return {
        "reward": float(np.mean(rewards_)) if rewards_ else None,
        "reward_std": float(np.std(rewards_)) if rewards_ else None,
        "length": float(np.mean([row[1] for row in rows])) if rows else 0.0,
        "cut_off": sum(not row[2] for row in rows) / count,
        "groups_that_differ": sum(told) / max(1, len(told)),
        "rollout_staleness": sum(row[4] for row in rows) / count,
        "tokens": sum(row[1] + row[3] for row in rows),
    }


def failures_of(engine: Engine, groups: Sequence[Group]) -> tuple[dict[str, float], Counter[str]]:
    """Shares of the responses of all ranks that have no reward, and how often what was given as the
    reason; a collective.

    Args:
        groups: all that were drawn, also those that a step does without: judges that fail often
            leave groups that are not trained on.
    """
    outcomes = [
        (w.reward is None, w.outcome, tuple(w.facts.get("reasons", ())) if w.reward is None else ())
        for _, _, rewards in groups
        for w in rewards
    ]
    rows = [row for share in shares_of(engine, outcomes) for row in share]
    count = max(1, len(rows))
    shares = {
        "unrewarded": sum(row[0] for row in rows) / count,
        "unparseable": sum(row[1] == "unparseable" for row in rows) / count,
        "failed": sum(row[1] == "failed" for row in rows) / count,
    }
    return shares, Counter(reason for row in rows for reason in row[2])


def differ(group: Group) -> bool:
    """Whether two of a group's rewards do."""
    rewards, errors = [w.reward for w in group[2]], [w.error for w in group[2]]
    return bool(informative(rewards, [0] * len(rewards), errors).any())


def gap_of(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from those of training; a collective."""
    total, count, most = 0.0, 0, 0.0
    for batch in batches:
        difference = batch.extras["old_log_probs"] - batch.extras.get("rollout_log_probs", 0.0)
        values = difference[batch.loss_mask].abs()
        if len(values):
            total, count = total + float(values.sum()), count + len(values)
            most = max(most, float(values.max()))
    shares = shares_of(engine, (total, count, most))
    return {
        "rollout_gap": sum(share[0] for share in shares) / max(sum(s[1] for s in shares), 1),
        "rollout_gap_max": max(share[2] for share in shares),
    }


def updates_told(results: Sequence[StepResult], prefix: str = "") -> dict[str, float]:
    """Of the optimizer steps of a step."""
    if not results:
        return {}
    means = {n: float(np.mean([r.metrics[n] for r in results])) for n in results[0].metrics}
    return {
        f"{prefix}loss": float(np.mean([r.loss for r in results])),
        f"{prefix}grad_norm": float(np.mean([r.grad_norm for r in results])),
        f"{prefix}lr": results[-1].lr,
        **means,
    }
