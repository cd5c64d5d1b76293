"""Comparison of every layout with one rank, written as the documentation's page on layouts.

    python -m tests.training.layout_table docs/experiments/layouts.md

It takes about ten minutes on two cores; `make layouts` runs it.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.training.layouts import (
    KINDS,
    LAYOUTS,
    ONE_RANK,
    STEPS,
    WARMUP,
    Difference,
    Layout,
    difference,
    train,
)

# Runs resume after the first of these steps, while thresholds route, and are compared until the
# second.
SAVED, WATCHED = 12, 16

HEADER = [
    "layout", "ranks", "flags", "loss", "gradient norm, thresholds", "routing counts",
    "resumes one rank", "one rank resumes it",
]  # fmt: skip

INTRODUCTION = f"""\
# Layouts

This page is for readers who choose a parallel layout and want to know whether it changes the
run. It compares the runs of different layouts with the same run on one rank.

Each row of a table is a run of {STEPS} steps on real ranks, of which the first {WARMUP} route by
expert choice. The columns after the flags report:

- **loss**: the largest difference of a loss from that on one rank;
- **gradient norm, thresholds**: the largest difference of a gradient norm, or of an expert's
  cutoff or threshold;
- **routing counts**: whether the number of tokens of every expert and the fan-out are equal in
  every step;
- **resumes one rank**: whether the layout, resumed after {SAVED} steps from the checkpoint of one
  rank, has the losses of the undisturbed run;
- **one rank resumes it**: the same for one rank, resumed from the checkpoint of the layout.

`make layouts` measures the tables on CPUs and writes this page.
`tests/training/test_layouts.py` trains all layouts again.
"""


def holds(measured: Difference, layout: Layout) -> bool:
    """Return whether a difference is within the tolerance of the layout's comparison."""
    kind = KINDS[layout.kind]
    return (
        measured.loss <= kind.loss
        and measured.rest <= kind.rest
        and (measured.counts or kind.counts_may)
    )


def start_flags(layout: Layout, one_rank: Callable[[str], Path]) -> tuple[str, ...]:
    """Return the flags that start a run at the first step of its comparison."""
    if not KINDS[layout.kind].after_warmup:
        return ()
    return ("--load", str(one_rank("fp32") / "checkpoints"), "--ckpt-step", str(WARMUP))


def row(layout: Layout, cells: list[str]) -> list[str]:
    """Return a row of the table: three cells that describe the layout, and the measured cells."""
    return [layout.name, str(layout.ranks), f"`{' '.join(layout.flags)}`" if layout.flags else "",
            *cells]  # fmt: skip


def as_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measure(folder: Path) -> dict[str, list[list[str]]]:
    """Train all layouts and return the rows of each comparison by its key."""
    rows_of: dict[str, list[Any]] = {}

    @cache
    def one_rank(kind: str) -> Path:
        run = folder / f"one-{kind}"
        layout = ONE_RANK[kind]
        interval = ("--save-interval", "4")
        rows_of[kind] = train(run, layout, *interval, *start_flags(layout, one_rank), save=True)
        return run

    tables: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    for number, layout in enumerate(LAYOUTS):
        reference = one_rank(layout.kind)
        expected = rows_of[layout.kind]
        run = folder / str(number)
        start = start_flags(layout, one_rank)
        rows = train(run, layout, "--save-interval", str(SAVED), *start, save=True)
        whole = difference(rows, expected)
        watched = [r for r in expected if SAVED < r["step"] <= WATCHED]
        stop = ("--exit-interval", str(WATCHED), "--ckpt-step", str(SAVED))
        verdicts: list[str] = []
        for resuming, source in ((layout, reference), (ONE_RANK[layout.kind], run)):
            load = ("--load", str(source / "checkpoints"), *stop)
            resumed = train(folder / f"{number}-{len(verdicts)}", resuming, *load)
            result = difference(resumed, watched)
            verdicts.append(
                "yes" if result.loss <= KINDS[layout.kind].loss else f"{result.loss:.0e}"
            )
        measured = [f"{whole.loss:.0e}", f"{whole.rest:.0e}", "equal" if whole.counts else "differ"]
        assert holds(whole, layout), (layout, whole)
        tables[layout.kind].append(row(layout, [*measured, *verdicts]))
        print(as_line(tables[layout.kind][-1]), flush=True)
    return tables


def document(tables: dict[str, list[list[str]]]) -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for key, kind in KINDS.items():
        shared = f" Shared flags: `{' '.join(kind.flags)}`." if kind.flags else ""
        parts.append(
            f"\n## {kind.title}\n\n{kind.about}{shared} Tolerance: {kind.loss:.0e} for losses, "
            f"{kind.rest:.0e} for gradient norms, cutoffs and thresholds.\n\n"
        )
        lines = [HEADER, ["---"] * len(HEADER), *tables[key]]
        parts.append("".join(as_line(cells) + "\n" for cells in lines))
    return "".join(parts)


def main() -> None:
    [target] = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        page = document(measure(Path(folder)))
    temporary = Path(target + ".tmp")
    temporary.write_text(page)
    temporary.replace(target)


if __name__ == "__main__":
    main()
