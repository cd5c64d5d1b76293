"""Checks that enough items of a command ended with a result."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from alignment.records import Verdict
from megatron_ext.errors import TooFewResults


def commonest(reasons: Iterable[str]) -> str:
    """Return the commonest reason and how often it occurs.

    Reasons that differ only in numbers or in quoted text count as one.

    Args:
        reasons: The reasons, at least one.
    """
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        groups.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", reason), []).append(reason)
    group = max(groups.values(), key=len)
    times = "once" if len(group) == 1 else f"{len(group):,} times"
    return f"{Counter(group).most_common(1)[0][0]} ({times})"


def reasons_of(verdicts: Iterable[Verdict]) -> list[str]:
    """Return the reasons of the verdicts without a judgment."""
    return [verdict.reason for verdict in verdicts if not verdict.judged]


def require_results(
    reasons: Collection[str],
    total: int,
    max_failed: float,
    items: str = "questions",
    lack: str = "verdict",
) -> None:
    """Check that no more than a share of the items lacks a result.

    Args:
        reasons: The reason of each item without a result.
        total: Number of all items.
        max_failed: Share of the items that may have no result.
        items: Name of the items.
        lack: Name of the result.

    Raises:
        TooFewResults: If more items have none; the message names the commonest reason.
    """
    if reasons and len(reasons) / total > max_failed:
        raise TooFewResults(
            f"{len(reasons):,} of {total:,} {items} have no {lack}, more than --max-failed "
            f"{max_failed:g}; most often: {commonest(reasons)}. Correct the cause, or raise "
            "--max-failed to accept them."
        )


def require_usable(reasons: Sequence[str], total: int, max_left_out: float, items: str) -> None:
    """Check that no more than a share of the training data is left out.

    Args:
        reasons: The reason of each item that is left out.
        total: Number of all items.
        max_left_out: Share of the items that may be left out.
        items: Name of the data, with their flag or file.

    Raises:
        TooFewResults: If more items are left out; the message names the commonest reason.
    """
    if reasons and len(reasons) / total > max_left_out:
        raise TooFewResults(
            f"{len(reasons):,} of {total:,} {items} are left out, more than --max-left-out "
            f"{max_left_out:g}; most often: {commonest(reasons)}. Correct the cause, or raise "
            "--max-left-out to train on the others."
        )
