"""Scale of scores: the score of every verdict lies between 0 and 9."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignment.data.dataset_schemas import own_kind
from alignment.data.people_labels import PersonLabel, verdicts_of
from alignment.data.read_options import ReadOptions
from alignment.data.source_row import LabeledRecord
from alignment.record_files import read_all, read_labeled
from alignment.records import Pair, Response, Verdict
from megatron_ext.console import console
from megatron_ext.data.row_files import MalformedRow, expand_row_files, read_rows
from megatron_ext.errors import UserError

LOW, HIGH = 0.0, 9.0
_FEWEST_SCORES = 10  # fewer may be between 0 and 1 by chance
_ROUNDING = 1e-6  # share of the length of a scale by which a score may exceed its ends


def check_scale(scale: Sequence[float], name: str) -> None:
    """Raise a `UserError` unless the two ends of a scale are finite and in order."""
    if len(scale) != 2 or not all(map(math.isfinite, scale)) or not scale[0] < scale[1]:
        ends = " ".join(f"{end:g}" for end in scale)
        raise UserError(f"{name} {ends} must be two finite numbers, the lower one first.")


def rescale(score: float, scale: Sequence[float] | None = None) -> float:
    """Return a score mapped linearly from a scale to 0 to 9.

    Args:
        score: The score.
        scale: The lowest and the highest score of the scale. Default: 0 and 9.

    Raises:
        ValueError: If the score is outside of the scale; only rounding errors are clamped.
    """
    low, high = scale or (LOW, HIGH)
    slack = _ROUNDING * (high - low)
    if not low - slack <= score <= high + slack:
        raise ValueError(f"the score {score:g} is outside of the scale from {low:g} to {high:g}")
    score = min(high, max(low, score))
    if (low, high) == (LOW, HIGH):
        return score
    return LOW + (HIGH - LOW) * ((score - low) / (high - low))


def read_verdicts(
    path: Path,
    scale: Sequence[float] | None = None,
    flag: str = "",
    options: ReadOptions | None = None,
) -> list[Verdict]:
    """Read the verdicts of a file, with their scores mapped to 0 to 9.

    A file of responses or pairs gives the verdicts of the people who labeled them.

    Args:
        path: The file.
        scale: The lowest and the highest score of the file's scale. Default: 0 and 9; ratings by
            people have none.
        flag: The flag that states the scale, for the error message.
        options: How a file of another project is read; its limit does not count.

    Raises:
        UserError: If the file cannot be used, or a score is outside of the scale.
    """
    options = options or ReadOptions()
    if not has_verdicts(path):
        return people_verdicts(path, scale, flag, options)
    verdicts = read_all(path, Verdict)
    for place, verdict in enumerate(verdicts):
        if verdict.score is None:
            continue
        try:
            score = rescale(verdict.score, scale)
        except ValueError as error:
            advice = f". State the scale of its scores with {flag}." if flag else ""
            raise UserError(f"{path}, row {place + 1:,}: {error}{advice}") from None
        if score != verdict.score:
            verdicts[place] = replace(verdict, score=score)
    if scale is None and flag and os.environ.get("RANK", "0") == "0":
        _warn_of_unit_scale(path, [v.score for v in verdicts if v.score is not None], flag)
    return verdicts


def _warn_of_unit_scale(path: Path, scores: Sequence[float], flag: str) -> None:
    """Warn of scores that look like those of a scale from 0 to 1."""
    is_unit = all(0 <= score <= 1 for score in scores) and len(set(scores)) > 1
    if is_unit and len(scores) >= _FEWEST_SCORES:
        console.warn(
            f"warning: all {len(scores):,} scores of {path} are between 0 and 1, and are read on "
            f"the scale from 0 to 9. If their scale is from 0 to 1, add {flag} 0 1."
        )


def has_verdicts(path: Path) -> bool:
    """Return whether the first row of a file is a verdict; damaged files are reported later."""
    for file in expand_row_files([str(path)], flag=""):
        for _, row in read_rows(file):
            return isinstance(row, MalformedRow) or own_kind(row) is Verdict
    return True


def people_verdicts(
    path: Path, scale: Sequence[float] | None, flag: str, options: ReadOptions
) -> list[Verdict]:
    """Return the labels of people in a file of responses or pairs as verdicts.

    Raises:
        UserError: If the file has no label, or ratings without a scale or outside of it.
    """
    items = read_labeled([str(path)], Response, Pair, options=replace(options, limit=None))
    if not any(item.labels for item in items):
        raise UserError(
            f"{path} has neither verdicts nor labels of people. Name the column of the labels with "
            "--columns label=COLUMN (pairs) or score=COLUMN (responses)."
        )
    ratings = [
        label.score
        for item in items
        for label in item.labels
        if label.score is not None and not label.is_scaled
    ]
    if ratings and scale is None:
        raise UserError(
            f"{path} has ratings from {min(ratings):g} to {max(ratings):g}. State the lowest and "
            f"the highest rating that people could give with {flag or '--scale'} LOW HIGH."
        )
    return verdicts_of(
        (item.record.id, _scaled(path, item, scale))
        for item in items
        if not isinstance(item.record, Verdict)
    )


def _scaled(path: Path, item: LabeledRecord, scale: Sequence[float] | None) -> list[PersonLabel]:
    try:
        return [scaled_label(label, scale) for label in item.labels]
    except ValueError as error:
        raise UserError(f"{path}, row {item.number:,}: {error}. Correct the scale.") from None


def scaled_label(label: PersonLabel, scale: Sequence[float] | None) -> PersonLabel:
    """Return a label with its rating mapped to 0 to 9.

    Args:
        label: The label.
        scale: The lowest and the highest rating that people could give.

    Raises:
        ValueError: If the rating is outside of the scale, or there is no scale.
    """
    if label.score is None or label.is_scaled:
        return label
    if scale is None:
        raise ValueError(f"the rating {label.score:g} has no scale")
    return replace(label, score=rescale(label.score, scale), is_scaled=True)
