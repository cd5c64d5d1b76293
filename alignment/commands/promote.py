"""Let a retrained judge take the place of the one before, if it has not become worse.

    et-align promote --candidate RUN/best --current DIR \\
        --old-gold GOLD.jsonl --old-current V.jsonl --old-candidate V.jsonl \\
        [--new-gold GOLD.jsonl --new-current V.jsonl --new-candidate V.jsonl] \\
        [--old-items ITEMS.jsonl] [--new-items ITEMS.jsonl]

A policy leaves the texts that its judge was trained on. A judge that is trained again on what the
policy writes, labelled by gold, must still judge the old test set: the candidate is refused when
its agreement there may have fallen by more than --margin. On new items, samples of the policy say,
it must agree better than the current judge, by more than rounding. Both differences are taken on
the items that both judged, and it is the end of their 95 % interval that counts. Several responses
to a prompt are not independent: give --old-items and --new-items, and the intervals are over
prompts. A candidate is refused too when its share of malformed or failed verdicts exceeds the
current judge's by more than --margin.

A candidate that passes is copied to --current, never in part, and the exit code is 0; one that does
not leaves it as it is, and the code is 3. A kill between the two renames of the change leaves the
judge before beside it, in .NAME.old, and the next promotion first puts it back.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.judges.formats.scale import read_verdicts
from alignment.judges.results import reasons_of, require_results
from alignment.rounding import EXACT, Floats, exceeds
from alignment.statistics.agreement_measures import Compared
from alignment.statistics.agreement_text import aligned, cells
from alignment.statistics.bootstrap import Estimate, Indices, estimates
from alignment.statistics.slices import read_items
from alignment.statistics.verdict_alignment import Judged, by_item, groups_of, judged, shared_items
from megatron_ext.errors import ToolParser, UserError, run_tool

REFUSED = 3


@dataclass(frozen=True)
class Comparison:
    """Agreement of two judges with gold on the items of which both judged every question.

    Attributes:
        difference: candidate less current.
        unjudged: shares of the current judge's and of the candidate's verdicts, on all items, that
            are malformed or failed.
    """

    items: int
    unjudged: tuple[float, float]
    current: Estimate
    candidate: Estimate
    difference: Estimate


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    _recover(Path(options.current))
    old = compare(
        options.old_gold, options.old_current, options.old_candidate, options.resamples,
        options.old_items, options.max_failed,
    )  # fmt: skip
    found = {"old test set": old}
    problems = []
    if old.difference.low is None:
        problems.append(f"its agreement on the old test set is unknown ({_reason(old)})")
    elif exceeds(-old.difference.low, options.margin, EXACT, size=1.0):
        problems.append(
            f"on the old test set it may agree less by {-old.difference.low:.3f}, more than "
            f"--margin {options.margin}"
        )
    if options.new_gold:
        new = compare(
            options.new_gold, options.new_current, options.new_candidate, options.resamples,
            options.new_items, options.max_failed,
        )  # fmt: skip
        found["new items"] = new
        if new.difference.low is None:
            problems.append(f"its agreement on the new items is unknown ({_reason(new)})")
        elif not exceeds(new.difference.low, 0.0, size=1.0):  # of agreements, up to 1
            problems.append("on the new items it may agree no better than the current judge")
    for name, c in found.items():
        if exceeds(c.unjudged[1] - c.unjudged[0], options.margin, EXACT, size=1.0):
            problems.append(
                f"on the {name} it leaves {c.unjudged[1]:.1%} unjudged and the current judge "
                f"{c.unjudged[0]:.1%}, which is worse by more than --margin {options.margin}"
            )
    print(_table(found))
    if problems:
        print(f"refused: {'; '.join(problems)}; {options.current} stays as it is")
        return REFUSED
    _replace(Path(options.candidate), Path(options.current), found)
    print(f"promoted: {options.current} is now {options.candidate}")
    return 0


def compare(
    gold: str,
    current: str,
    candidate: str,
    resamples: int,
    judged_items: str | None = None,
    max_failed: float = 0.05,
) -> Comparison:
    """Read three files of verdicts on the same items and compare two of them with the first.

    Args:
        judged_items: a file of the responses or pairs; prompts are resampled then, not items.
        max_failed: share of gold's verdicts that may be no judgement.

    Raises:
        UserError: they are on different items, or of different kinds.
        TooFewResults: more of gold's verdicts than `max_failed` are no judgement.
    """
    names = [gold, current, candidate]
    verdicts = [by_item(read_verdicts(Path(name)), name) for name in names]
    reasons = reasons_of(verdict for each in verdicts[0].values() for verdict in each)
    total = sum(map(len, verdicts[0].values()))
    require_results(reasons, total, max_failed, f"verdicts of {gold}", "judgement")
    items = shared_items(verdicts[0], verdicts[1], False, names[:2])
    shared_items(verdicts[0], verdicts[2], False, [names[0], names[2]])
    judges = [judged(v, items, name) for v, name in zip(verdicts, names)]
    if len({judge.pairwise for judge in judges}) > 1:
        raise UserError(f"{', '.join(names)}: some have scores, others have preferences")
    # An item that one judge fails on must not count for the other: it may be a hard one.
    both = np.flatnonzero(_unjudged(judges[1]) + _unjudged(judges[2]) == 0)
    keys = items
    if judged_items:
        keys = [row.prompt.id for row in read_items(Path(judged_items), items)]
    groups = [both[group] for group in groups_of([keys[place] for place in both])]
    name = "accuracy" if judges[0].pairwise else "alpha_interval"
    figures: list[Callable[[Indices], float]] = [
        Compared(judges[0], judge).agreement()[name] for judge in judges[1:]
    ]
    each = estimates(
        {
            "current": figures[0],
            "candidate": figures[1],
            "difference": lambda places: figures[1](places) - figures[0](places),
        },
        groups,
        resamples,
    )
    lost = [float(_unjudged(j).sum() / j.verdicts.sum()) for j in judges[1:]]
    return Comparison(
        len(both), (lost[0], lost[1]), each["current"], each["candidate"], each["difference"]
    )


def _unjudged(judge: Judged) -> Floats:
    """Verdicts on each item that are no judgement, `[items]`."""
    return judge.malformed + judge.failed


def _reason(found: Comparison) -> str:
    return found.difference.reason or "no interval"


def _table(found: dict[str, Comparison]) -> str:
    rows = [["", "items", "current", "", "candidate", "", "difference", "", "unjudged", "before"]]
    for name, c in found.items():
        each = [*cells(c.current), *cells(c.candidate), *cells(c.difference)]
        unjudged = [f"{share:.1%}" for share in reversed(c.unjudged)]
        rows.append([name, str(c.items), *each, *unjudged])
    return "\n".join(aligned(rows))


def _old(current: Path) -> Path:
    """Where the judge before is while another takes its place."""
    return current.with_name(f".{current.name}.old")


def _recover(current: Path) -> None:
    """Finish what a killed promotion left."""
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


def _replace(candidate: Path, current: Path, found: dict[str, Comparison]) -> None:
    """Copy the candidate's folder to the current judge's place."""
    temporary = current.with_name(f".{current.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(candidate, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--candidate {candidate} cannot be copied beside --current {current}: {error}"
        ) from error
    promoted = {
        "from": str(candidate),
        **{name: [c.current.value, c.candidate.value] for name, c in found.items()},
    }
    (temporary / "promoted.json").write_text(json.dumps(promoted, indent=1) + "\n")
    # No portable call exchanges two folders: between the renames there is none, see `_recover`.
    if os.path.lexists(current):
        os.replace(current, _old(current))
    os.replace(temporary, current)
    _remove(_old(current))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(
        prog="et-align promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument
    add("--candidate", required=True, metavar="DIR", help="the retrained judge")
    add("--current", required=True, metavar="DIR", help="the judge in use, to be replaced")
    for when, what in (("old", "the old test set"), ("new", "new items")):
        for who in ("gold", "current", "candidate"):
            add(f"--{when}-{who}", required=when == "old", metavar="FILE",
                help=f"verdicts on {what}")
        add(f"--{when}-items", metavar="FILE",
            help=f"the {what} themselves, for intervals over prompts")
    add("--margin", type=float, default=0.02, metavar="X",
        help="agreement (alpha, or accuracy on pairs) that may be lost, and share of verdicts that "
        "may be unjudged in addition (%(default)s)")
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="Share of gold's verdicts that may be no judgement; more end the command with status "
        "3. Default: %(default)s.")
    add("--resamples", type=int, default=2000, metavar="N", help="(%(default)s)")
    # fmt: on
    options = parser.parse_args(argv)
    new = [options.new_gold, options.new_current, options.new_candidate]
    if any(new) and not all(new):
        raise UserError("--new-gold, --new-current and --new-candidate go together")
    if options.new_items and not options.new_gold:
        raise UserError("--new-items goes with --new-gold")
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max-failed {options.max_failed} is a share: from 0 to 1")
    if not options.margin >= 0 or options.resamples < 100:  # nor no number
        raise UserError("--margin must not be negative, and --resamples be at least 100")
    if not (Path(options.candidate) / "config.json").is_file():
        raise UserError(f"--candidate {options.candidate} is no Hugging Face folder of a judge")
    if Path(options.current).resolve() == Path(options.candidate).resolve():
        raise UserError("--candidate and --current are the same folder")
    return options


if __name__ == "__main__":
    run_tool(main)
