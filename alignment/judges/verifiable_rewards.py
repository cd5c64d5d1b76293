"""How far a judge that is being trained is from gold: a reward that can be verified."""

from collections.abc import Mapping
from typing import Any

from alignment.records import Outcome, Verdict

_SPAN = 9.0**2  # M of the paper: the largest squared distance of two scores


def judge_reward(fields: Mapping[str, Any], gold: Verdict) -> float:
    """The reward of arXiv 2603.12246 for one answer.

    Args:
        fields: of a verdict, as a parser reads them, in the pair's own order.
        gold: on the same question.

    Returns:
        -1 for an answer that is not in the form asked for or was cut off; of scores (M - d^2) / M
        for a distance d; of pairs 1 for gold's judgement and 0 for another.
    """
    outcome = Outcome(fields["outcome"])
    if outcome in (Outcome.UNPARSEABLE, Outcome.FAILED):
        return -1.0
    if gold.outcome is Outcome.SCORE:
        assert gold.score is not None
        return float(1 - (fields["score"] - gold.score) ** 2 / _SPAN)
    return float(outcome is gold.outcome and fields.get("preferred") == gold.preferred)
