"""Whether enough items of a command ended with a result."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from alignment.records import Verdict
from megatron_ext.errors import TooFewResults


def commonest(reasons: Iterable[str]) -> str:
    """Return the commonest reason and how often it occurs; reasons that differ in numbers or in
    quoted text alone are one."""
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        groups.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", reason), []).append(reason)
    group = max(groups.values(), key=len)
    times = "once" if len(group) == 1 else f"{len(group):,} times"
    return f"{Counter(group).most_common(1)[0][0]} ({times})"


def reasons_of(verdicts: Iterable[Verdict]) -> list[str]:
    """Return why verdicts are no judgement, for those that are none."""
    return [verdict.reason for verdict in verdicts if not verdict.judged]


def require_results(
    reasons: Collection[str],
    total: int,
    max_failed: float,
    what: str = "questions",
    lack: str = "verdict",
) -> None:
    """Check that no more than a share of the items lacks a result.

    Args:
        reasons: why, for each item without a result.

    Raises:
        TooFewResults: more do; naming the commonest reason.
    """
    if reasons and len(reasons) / total > max_failed:
        raise TooFewResults(
            f"{len(reasons):,} of {total:,} {what} have no {lack}, more than --max-failed "
            f"{max_failed:g}; most often: {commonest(reasons)}. Correct the cause, or raise "
            "--max-failed to accept them"
        )


def require_usable(reasons: Sequence[str], total: int, max_left_out: float, what: str) -> None:
    """Check that no more than a share of the data given to a training is left out.

    Args:
        reasons: why, for each one that is left out.
        what: the data, with the flag or file that they are from.

    Raises:
        TooFewResults: more are; naming the commonest reason.
    """
    if reasons and len(reasons) / total > max_left_out:
        raise TooFewResults(
            f"{len(reasons):,} of {total:,} {what} are left out, more than --max-left-out "
            f"{max_left_out:g}; most often: {commonest(reasons)}. Correct the cause, or raise "
            "--max-left-out to train on the others"
        )
