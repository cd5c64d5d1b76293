"""Comparison of every layout with one rank, written as the documentation's page on layouts.

    python -m tests.training.layout_table docs/experiments/layouts.md

It takes about fifteen minutes on two cores; `make layouts` runs it. With the keys of comparisons
after the path, `hybrid` for example, it measures only these and keeps the other tables of the page.
"""

import sys
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

from tests.training.layouts import (
    KINDS,
    LAYOUTS,
    ONE_RANK,
    STEPS,
    WARMUP,
    Kind,
    Layout,
    difference,
    holds,
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


def measure(folder: Path, kinds: Collection[str]) -> dict[str, list[list[str]]]:
    """Train the layouts of some comparisons and return the rows of each by its key."""
    rows_of: dict[str, list[Any]] = {}

    @cache
    def one_rank(kind: str) -> Path:
        run = folder / f"one-{kind}"
        layout = ONE_RANK[kind]
        interval = ("--save-interval", "4")
        rows_of[kind] = train(run, layout, *interval, *start_flags(layout, one_rank), save=True)
        return run

    tables: dict[str, list[list[str]]] = {kind: [] for kind in kinds}
    for number, layout in enumerate(layout for layout in LAYOUTS if layout.kind in kinds):
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


def tables_of(page: str) -> dict[str, str]:
    """Return the tables of a page, from the heading to the last row, by the key of the kind."""
    sections = {part.splitlines()[0]: f"\n## {part}" for part in page.split("\n## ")[1:]}
    return {key: sections[kind.title] for key, kind in KINDS.items() if kind.title in sections}


def section(kind: Kind, rows: list[list[str]]) -> str:
    """Return the part of the page with the table of a comparison."""
    shared = f" Shared flags: `{' '.join(kind.flags)}`." if kind.flags else ""
    text = (
        f"\n## {kind.title}\n\n{kind.about}{shared} Tolerance: {kind.loss:.0e} for losses, "
        f"{kind.rest:.0e} for gradient norms, cutoffs and thresholds.\n\n"
    )
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return text + "".join(as_line(cells) + "\n" for cells in lines)


def main() -> None:
    target, kinds = Path(sys.argv[1]), sys.argv[2:]
    tables = tables_of(target.read_text()) if kinds else {}
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        for key, rows in measure(Path(folder), kinds or list(KINDS)).items():
            tables[key] = section(KINDS[key], rows)
    temporary = Path(f"{target}.tmp")
    temporary.write_text(INTRODUCTION + "".join(tables[key] for key in KINDS))
    temporary.replace(target)


if __name__ == "__main__":
    main()
