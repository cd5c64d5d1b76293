"""Figures of a step: of its responses, of its optimizer steps; the same on every rank."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine, StepResult
from alignment.ranks import all_gather_by_data_rank
from alignment.rl.advantages import informative
from alignment.rl.tasks import Group


def response_metrics(engine: AlignmentEngine, groups: Sequence[Group]) -> dict[str, Any]:
    """Of the responses of all ranks, before the step; a collective."""
    flat = [
        (w.reward, len(r.tokens), r.ended, len(task.prompt), engine.step - r.version)
        for task, rollouts, rewards in groups
        for r, w in zip(rollouts, rewards)
    ]
    rows = [row for share in all_gather_by_data_rank(engine, flat) for row in share]
    told = [
        d
        for share in all_gather_by_data_rank(engine, list(map(rewards_differ, groups)))
        for d in share
    ]
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


def failure_metrics(
    engine: AlignmentEngine, groups: Sequence[Group]
) -> tuple[dict[str, float], Counter[str]]:
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
    rows = [row for share in all_gather_by_data_rank(engine, outcomes) for row in share]
    count = max(1, len(rows))
    shares = {
        "unrewarded": sum(row[0] for row in rows) / count,
        "unparseable": sum(row[1] == "unparseable" for row in rows) / count,
        "failed": sum(row[1] == "failed" for row in rows) / count,
    }
    return shares, Counter(reason for row in rows for reason in row[2])


def rewards_differ(group: Group) -> bool:
    """Whether two of a group's rewards do."""
    rewards, errors = [w.reward for w in group[2]], [w.error for w in group[2]]
    return bool(informative(rewards, [0] * len(rewards), errors).any())


def rollout_gap(engine: AlignmentEngine, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from those of training; a collective.

    Returns:
        nats a token: the mean distance, the largest, and how much larger the sampler's are on
        average, which estimates the divergence of the sampler from the policy (`rollout_kl`).
    """
    differences = [
        (batch.extras["rollout_log_probs"] - batch.extras["old_log_probs"])[batch.loss_mask]
        for batch in batches
        if batch.rows
    ]
    own = torch.cat([torch.zeros(0), *differences]).double()
    most = float(own.abs().max()) if len(own) else 0.0
    shares = all_gather_by_data_rank(
        engine, (float(own.abs().sum()), float(own.sum()), len(own), most)
    )
    count = max(1, sum(share[2] for share in shares))
    return {
        "rollout_gap": sum(share[0] for share in shares) / count,
        "rollout_kl": sum(share[1] for share in shares) / count,
        "rollout_gap_max": max(share[3] for share in shares),
    }


def update_metrics(results: Sequence[StepResult], prefix: str = "") -> dict[str, float]:
    """Return the mean figures of the optimizer steps that one step of learning made.

    Steps that were skipped because fp16 gradients overflowed have no norm of gradients; they are
    counted as `overflows`.
    """
    if not results:
        return {}
    means = {n: float(np.mean([r.metrics[n] for r in results])) for n in results[0].metrics}
    norms = [r.grad_norm for r in results if r.grad_norm is not None]
    row = {f"{prefix}loss": float(np.mean([r.loss for r in results]))}
    if norms:
        row[f"{prefix}grad_norm"] = float(np.mean(norms))
    if len(norms) < len(results):
        row[f"{prefix}overflows"] = float(len(results) - len(norms))
    return {**row, f"{prefix}lr": results[-1].lr, **means}
