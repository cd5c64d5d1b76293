"""Scale of scores: the score of every verdict lies between 0 and 9."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignment.record_files import read_all
from alignment.records import Verdict
from megatron_ext.errors import UserError

LOW, HIGH = 0.0, 9.0
_ROUNDING = 1e-6  # share of the length of a scale by which a score may exceed it


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
    path: Path, scale: Sequence[float] | None = None, flag: str = ""
) -> list[Verdict]:
    """Read the verdicts of a file, with their scores mapped to 0 to 9.

    Args:
        path: The file.
        scale: The lowest and the highest score of the file's scale. Default: 0 and 9.
        flag: The flag that states the scale, for the error message.

    Raises:
        UserError: If the file cannot be used, or a score is outside of the scale.
    """
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
    return verdicts
