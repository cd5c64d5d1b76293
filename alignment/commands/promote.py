"""Command `et-align promote`; its help is in `promote_config`."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.commands.promote_config import PromoteConfig, parse
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.results import reasons_of, require_results
from alignment.rounding import EXACT, Floats, exceeds
from alignment.statistics.agreement_text import aligned, cells
from alignment.statistics.bootstrap import Estimate
from alignment.statistics.judge_difference import agreement_differences, compared_items
from alignment.statistics.slices import read_items
from alignment.statistics.verdict_alignment import (
    AlignedVerdicts,
    align_verdicts,
    shared_items,
    verdicts_by_item,
)
from megatron_ext.errors import UserError

REFUSED = 3


@dataclass(frozen=True)
class JudgeComparison:
    """Agreement of two judges with the gold judge on the items where both judged every question.

    Attributes:
        items: Number of these items.
        unjudged: Shares of the current judge's and of the candidate's verdicts, on all items, that
            are malformed or failed.
        current: Agreement of the current judge.
        candidate: Agreement of the candidate.
        difference: Agreement of the candidate minus that of the current judge.
    """

    items: int
    unjudged: tuple[float, float]
    current: Estimate
    candidate: Estimate
    difference: Estimate


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: PromoteConfig) -> int:
    """Promote the candidate or refuse it; return the exit status."""
    _recover(Path(config.current))
    old = compare(
        config.old_gold, config.old_current, config.old_candidate, config.resamples,
        config.old_items, config.max_failed,
    )  # fmt: skip
    comparisons = {"old test set": old}
    problems = []
    if old.difference.low is None:
        problems.append(f"its agreement on the old test set is unknown ({_reason(old)})")
    elif exceeds(-old.difference.low, config.margin, EXACT, size=1.0):
        problems.append(
            f"on the old test set it may agree less by {-old.difference.low:.3f}, more than "
            f"--margin {config.margin}"
        )
    if config.new_gold and config.new_current and config.new_candidate:
        new = compare(
            config.new_gold, config.new_current, config.new_candidate, config.resamples,
            config.new_items, config.max_failed,
        )  # fmt: skip
        comparisons["new items"] = new
        if new.difference.low is None:
            problems.append(f"its agreement on the new items is unknown ({_reason(new)})")
        elif not exceeds(new.difference.low, 0.0, size=1.0):  # of agreements, up to 1
            problems.append("on the new items it may agree no better than the current judge")
    for name, c in comparisons.items():
        if exceeds(c.unjudged[1] - c.unjudged[0], config.margin, EXACT, size=1.0):
            problems.append(
                f"on the {name} it leaves {c.unjudged[1]:.1%} unjudged and the current judge "
                f"{c.unjudged[0]:.1%}, which is worse by more than --margin {config.margin}"
            )
    print(_table(comparisons))
    if problems:
        print(f"Refused the candidate: {'; '.join(problems)}. {config.current} is unchanged.")
        return REFUSED
    _replace(Path(config.candidate), Path(config.current), comparisons)
    print(f"Promoted the candidate: {config.current} is now a copy of {config.candidate}.")
    return 0


def compare(
    gold: str,
    current: str,
    candidate: str,
    resamples: int,
    judged_items: str | None = None,
    max_failed: float = 0.05,
) -> JudgeComparison:
    """Compare the agreement of two judges with the gold judge on the same items.

    Args:
        gold: File of the verdicts of the gold judge.
        current: File of the verdicts of the current judge.
        candidate: File of the verdicts of the candidate.
        resamples: Number of resamples of the bootstrap.
        judged_items: File of the responses or pairs, for a bootstrap over prompts. Default: over
            items.
        max_failed: Share of the gold judge's verdicts that may have failed.

    Raises:
        UserError: The verdicts are on different items, or of different kinds.
        TooFewResults: More of the gold judge's verdicts than `max_failed` have failed.
    """
    names = [gold, current, candidate]
    verdicts = [verdicts_by_item(read_verdicts(Path(name)), name) for name in names]
    reasons = reasons_of(verdict for each in verdicts[0].values() for verdict in each)
    total = sum(map(len, verdicts[0].values()))
    require_results(reasons, total, max_failed, f"verdicts of {gold}", "judgement")
    items = shared_items(verdicts[0], verdicts[1], False, names[:2])
    shared_items(verdicts[0], verdicts[2], False, [names[0], names[2]])
    judges = [align_verdicts(v, items, name) for v, name in zip(verdicts, names)]
    if len({judge.pairwise for judge in judges}) > 1:
        raise UserError(
            f"{', '.join(names)} cannot be compared: some have scores and others have preferences. "
            "Give files of one kind."
        )
    keys = items
    if judged_items:
        keys = [row.prompt.id for row in read_items(Path(judged_items), items)]
    name = "accuracy" if judges[0].pairwise else "alpha_interval"
    pair = (judges[1], judges[2])
    result = agreement_differences(judges[0], pair, [name], keys, resamples)[name]
    lost = [float(_unjudged(j).sum() / j.verdicts.sum()) for j in judges[1:]]
    return JudgeComparison(
        len(compared_items(judges[0], pair)), (lost[0], lost[1]), result.first, result.second,
        result.difference,
    )  # fmt: skip


def _unjudged(judge: AlignedVerdicts) -> Floats:
    """Return the number of unjudged verdicts on each item, `[items]`."""
    return judge.malformed + judge.failed


def _reason(comparison: JudgeComparison) -> str:
    return comparison.difference.reason or "no interval"


def _table(comparisons: dict[str, JudgeComparison]) -> str:
    rows = [["", "items", "current", "", "candidate", "", "difference", "", "unjudged", "before"]]
    for name, c in comparisons.items():
        each = [*cells(c.current), *cells(c.candidate), *cells(c.difference)]
        unjudged = [f"{share:.1%}" for share in reversed(c.unjudged)]
        rows.append([name, str(c.items), *each, *unjudged])
    return "\n".join(aligned(rows))


def _old(current: Path) -> Path:
    """Return the place of the former judge while another replaces it."""
    return current.with_name(f".{current.name}.old")


def _recover(current: Path) -> None:
    """Restore the former judge, and remove the temporary folders of a killed promotion."""
    old = _old(current)
    if os.path.lexists(old) and not os.path.lexists(current):
        os.replace(old, current)
    _remove(old)
    for copy in current.parent.glob(f".{current.name}.*.tmp"):
        shutil.rmtree(copy)


def _remove(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)


def _replace(candidate: Path, current: Path, comparisons: dict[str, JudgeComparison]) -> None:
    """Replace the folder of the current judge by a copy of the candidate's."""
    temporary = current.with_name(f".{current.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(candidate, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--candidate {candidate} cannot be copied next to --current {current}: {error}."
        ) from error
    promoted = {
        "from": str(candidate),
        **{name: [c.current.value, c.candidate.value] for name, c in comparisons.items()},
    }
    (temporary / "promoted.json").write_text(json.dumps(promoted, indent=1) + "\n")
    # No portable call exchanges two folders: between the renames there is none, see `_recover`.
    if os.path.lexists(current):
        os.replace(current, _old(current))
    os.replace(temporary, current)
    _remove(_old(current))
