"""Verifiable reward of a judge in training: how close its answer is to gold."""

from collections.abc import Mapping
from typing import Any

from alignment.records import Outcome, Verdict

_SPAN = 9.0**2  # M in the paper: the largest squared distance of two scores


def judge_reward(fields: Mapping[str, Any], gold: Verdict) -> float:
    """Return the reward of arXiv 2603.12246 for one answer.

    Args:
        fields: The fields of the verdict, as a parser returns them, in the order of the pair.
        gold: The gold verdict on the same question.

    Returns:
        -1 for an answer that is malformed or cut off. For scores (M - d^2) / M, where d is the
        distance to gold; for pairs 1 if the judgment is gold's, and otherwise 0.
    """
    outcome = Outcome(fields["outcome"])
    if outcome in (Outcome.UNPARSEABLE, Outcome.FAILED):
        return -1.0
    if gold.outcome is Outcome.SCORE:
        assert gold.score is not None
        return float(1 - (fields["score"] - gold.score) ** 2 / _SPAN)
    return float(outcome is gold.outcome and fields.get("preferred") == gold.preferred)
