"""Labels and ratings by people, and their conversion to verdicts."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.records import Outcome, Side, Verdict
from megatron_ext.errors import UserError

PEOPLE = "people"  # judge of verdicts by people whom the data does not name
_TIES = {
    "tie", "tied", "draw", "equal", "same", "both", "neither", "no preference", "none",
    "tie (bothbad)", "tie_bothbad", "both_bad", "bothbad", "both bad", "both good",
}  # fmt: skip
_PREFIXES = ("model_", "response_", "answer_", "assistant_", "completion_", "output_", "option_")
_YES = {"true": True, "yes": True, "good": True, "false": False, "no": False, "bad": False}


@dataclass(frozen=True)
class PersonLabel:
    """Label of one person about one item.

    Attributes:
        outcome: A score, a preference or a tie.
        score: The score on the scale of the data.
        preferred: The preferred side of a pair.
        annotator: Name of the person; `PEOPLE` if the data has none.
        is_scaled: Whether the score is already on the scale from 0 to 9, such as that of a thumb up
            or down.
    """

    outcome: Outcome
    score: float | None = None
    preferred: Side | None = None
    annotator: str = PEOPLE
    is_scaled: bool = False

    @classmethod
    def of_side(cls, side: Side | None, annotator: str = PEOPLE) -> "PersonLabel":
        """Return the label of a pair; a tie if no side is preferred."""
        outcome = Outcome.TIE if side is None else Outcome.PREFERENCE
        return cls(outcome, preferred=side, annotator=annotator)


def parse_side(
    value: Any, ends: tuple[str, str], mapping: Mapping[str, str], column: str
) -> Side | None:
    """Return the side that the label of a pair names, or None for a tie.

    Args:
        value: The label: first, second, a tie, or how the column of a response ends, such as "a"
            or "model_a" for response_a.
        ends: How the columns of the first and of the second response end.
        mapping: Values mapped to first, second and tie, which come before the rules above.
        column: Name of the column, for the error message.

    Raises:
        UserError: It names neither.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    if mapping:
        text = {str(key).lower(): ours for key, ours in mapping.items()}.get(text, text)
    bare = text
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    if text in _TIES or bare in _TIES:
        return None
    for side, end in zip(Side, ends):
        if bare in (side, end.lower()) or text in (side, end.lower()):
            return side
    raise UserError(
        f"the label {value!r} in {column} is neither {ends[0]} nor {ends[1]} nor a tie: state "
        "what it means with --labels first=VALUE second=VALUE tie=VALUE"
    )


def score_label(value: Any, annotator: str, mapping: Mapping[str, str], column: str) -> PersonLabel:
    """Return the label in a rating of a response, or in a thumb up or down.

    Args:
        value: A number, true or false, or a value of `mapping`.
        annotator: Name of the person.
        mapping: Values mapped to scores.
        column: Name of the column, for the error message.

    Raises:
        UserError: It is none of these.
    """
    text = str(value).strip()
    text = mapping.get(text, text)
    agrees = _YES.get(text.lower())
    if agrees is not None:
        return PersonLabel(Outcome.SCORE, 9.0 if agrees else 0.0, None, annotator, True)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(
            f"the rating {value!r} in {column} is neither a number nor true or false: state the "
            "score that it means with --labels 9=VALUE 0=VALUE"
        )
    return PersonLabel(Outcome.SCORE, score, None, annotator)


def several_labels(value: Any, annotator: str | None) -> list[tuple[Any, str]]:
    """Return the values of a column of labels, each with the name of its annotator.

    Args:
        value: One label, a list of those of several people, or a mapping from their names.
        annotator: Name of the annotator of the row; None where it names none.
    """
    if isinstance(value, Mapping):
        return [(label, str(name)) for name, label in value.items() if not _is_missing(label)]
    if isinstance(value, list | tuple):
        names = [f"{PEOPLE}-{place}" for place in range(1, len(value) + 1)]
        return [(label, name) for label, name in zip(value, names) if not _is_missing(label)]
    return [] if _is_missing(value) else [(value, annotator or PEOPLE)]


def _is_missing(value: Any) -> bool:
    """Return whether a cell has no value; NaN is how tables of numbers store that."""
    return value is None or value == "" or value != value


def verdicts_of(
    labeled: Iterable[tuple[str, Sequence[PersonLabel]]], counts: Counter[str] | None = None
) -> list[Verdict]:
    """Return the verdicts of people on items, those of an item numbered in their order.

    Args:
        labeled: Ids of items, which may repeat, with labels. Ratings must be on the scale of the
            verdicts.
        counts: Verdicts so far by item, to which these are added. Default: none.
    """
    counts = Counter() if counts is None else counts
    verdicts: list[Verdict] = []
    for item, labels in labeled:
        for label in labels:
            verdicts.append(
                Verdict(
                    item, label.outcome, label.score, label.preferred, sample=counts[item],
                    judge=label.annotator,
                )
            )  # fmt: skip
            counts[item] += 1
    return verdicts
