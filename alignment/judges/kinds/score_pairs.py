"""Preferences of judges that score responses: the response with the higher score is preferred."""

import json
from collections.abc import Sequence

from alignment.judges.questions import Question
from alignment.records import Outcome, Pair, Response, Side, Verdict
from alignment.rounding import is_constant


def responses_of(pair: Pair) -> tuple[Response, Response]:
    """Return the two responses of a pair."""
    return (
        Response(f"{pair.id}/first", pair.prompt, pair.first, pair.source),
        Response(f"{pair.id}/second", pair.prompt, pair.second, pair.source),
    )


def questions_about_responses(questions: Sequence[Question]) -> list[Question]:
    """Return questions about the responses of pairs, two for each, and the others as they are."""
    return [
        about
        for question in questions
        for about in (
            [Question(r, sample=question.sample) for r in responses_of(question.item)]
            if isinstance(question.item, Pair)
            else [question]
        )
    ]


def prefer_higher(
    pair: Pair,
    first: Verdict,
    second: Verdict,
    swapped: bool,
    sample: int,
    error: float,
    size: float = 0.0,
) -> Verdict:
    """Return the verdict on a pair, which is the same in both orders.

    Args:
        pair: The pair.
        first: The verdict on its first response, a score or a failure.
        second: The verdict on its second response.
        swapped: Whether the question was about the pair in the other order.
        sample: Number of this answer among several to the same question.
        error: Relative error of the scores; scores that differ by no more are a tie.
        size: Magnitude to which the error is relative where the scores are smaller.
    """
    side, reason = None, ""
    if first.score is None or second.score is None:
        lacking = [verdict for verdict in (first, second) if verdict.score is None]
        failed = any(verdict.outcome is Outcome.FAILED for verdict in lacking)
        outcome = Outcome.FAILED if failed else Outcome.UNPARSEABLE
        reason = "; ".join(dict.fromkeys(verdict.reason for verdict in lacking))
    elif is_constant([first.score, second.score], error, size):
        outcome = Outcome.TIE
    else:
        outcome = Outcome.PREFERENCE
        side = Side.FIRST if first.score > second.score else Side.SECOND
    scores = json.dumps({"first": first.score, "second": second.score})
    return Verdict(
        pair.id, outcome, None, side, swapped, sample, reason, answer=scores, judge=first.judge
    )
