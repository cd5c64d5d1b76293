"""Measure how far one judge agrees with another on the same items.

    et-align agreement GOLD.jsonl OTHER.jsonl --items ITEMS.jsonl --output DIR

Prints every figure with a bootstrap interval, and writes agreement.json and agreement.png to
--output. A figure that these verdicts do not give is said to be undefined, with the reason.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.judges.formats.scale import check_scale, read_verdicts
from alignment.new_output_folder import check_folder
from alignment.statistics.agreement_measures import Compared, alone
from alignment.statistics.agreement_pictures import draw
from alignment.statistics.agreement_text import Part, table
from alignment.statistics.bootstrap import LEVEL, Indices, estimates
from alignment.statistics.slices import SLICES, keys_of, read_items
from alignment.statistics.verdict_alignment import by_item, groups_of, judged, shared_items
from megatron_ext.errors import TooFewResults, ToolParser, UserError, run_tool
from megatron_ext.progress import Progress

# Slices beyond these would make a table that nobody reads.
_MOST_SLICES = 12


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    files = [Path(options.first), Path(options.second)]
    names = [str(file) for file in files]
    scales = {"--first-scale": options.first_scale, "--second-scale": options.second_scale}
    verdicts = [
        by_item(read_verdicts(file, scale, flag), str(file))
        for file, (flag, scale) in zip(files, scales.items())
    ]
    items = shared_items(verdicts[0], verdicts[1], options.common, names)
    rows = read_items(Path(options.items), items) if options.items else None
    judges = [judged(found, items, name) for found, name in zip(verdicts, names)]
    if judges[0].pairwise != judges[1].pairwise:
        raise UserError(f"{names[0]} and {names[1]}: one has scores, the other has preferences")
    compared = Compared(judges[0], judges[1], options.label == "mean")
    keys = items
    if options.resample == "prompt":
        assert rows is not None
        keys = [row.prompt.id for row in rows]
    slices = {name: keys_of(name, compared, rows, _MOST_SLICES) for name in options.slice}
    steps = 1 + sum(len(found) for found in slices.values())
    with Progress("resampling", steps * options.resamples, "resamples") as progress:
        done = itertools.count(1)
        measure = partial(
            _part, compared, keys, options.resamples, options.seed,
            lambda: progress.update(next(done)),
        )  # fmt: skip
        whole = measure(np.arange(len(items)))
        parts = {
            name: {key: measure(places) for key, places in found.items()}
            for name, found in slices.items()
        }
    print(table(judges[0].pairwise, whole, parts))
    if options.output:
        _write(Path(options.output), compared, names, whole, parts, options)
    if not whole.both:
        raise TooFewResults(
            f"none of the {len(items):,} items has a judgement in both {names[0]} and {names[1]}: "
            "there is nothing to compare"
        )


def _part(
    compared: Compared,
    keys: Sequence[str],
    resamples: int,
    seed: int,
    advance: Callable[[], None],
    places: Indices,
) -> Part:
    """All figures over the items at some places."""
    groups = [places[group] for group in groups_of([keys[place] for place in places])]
    both, *each = compared.agreement(), alone(compared.a), alone(compared.b)
    # One call, so that all figures have the same resamples.
    named: dict[tuple[int, str], Callable[[Indices], float]] = {
        (number, name): figure
        for number, figures in enumerate([both, *each])
        for name, figure in figures.items()
    }
    found = estimates(named, groups, resamples, seed, advance)
    split = [{n: e for (at, n), e in found.items() if at == number} for number in range(3)]
    a, b = compared.labels()
    judged_by_both = int((~np.isnan(a[places]) & ~np.isnan(b[places])).sum())
    return Part(len(places), judged_by_both, split[0], split[1:])


def _write(
    folder: Path,
    compared: Compared,
    names: Sequence[str],
    whole: Part,
    parts: Mapping[str, Mapping[str, Part]],
    options: argparse.Namespace,
) -> None:
    labels, counts = compared.confusion()
    content: dict[str, Any] = {
        "first": {"file": names[0], "judges": compared.a.identities},
        "second": {"file": names[1], "judges": compared.b.identities},
        "resampled": options.resample,
        "resamples": options.resamples,
        "level": LEVEL,
        "label": options.label,
        "all": whole.to_json(),
        "slices": {
            name: {key: part.to_json() for key, part in found.items()}
            for name, found in parts.items()
        },
        "confusion": {"labels": labels, "counts": counts.tolist()},
        "calibration": [
            {"second": b, "first": a, "items": count} for b, a, count in compared.calibration()
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "agreement.json"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(file)
    draw(compared, [Path(name).stem for name in names], folder / "agreement.png")
    print(f"\nwrote {file} and {folder / 'agreement.png'}")


def _check(options: argparse.Namespace) -> None:
    if options.resamples < 1:
        raise UserError(f"--resamples {options.resamples} must be at least 1")
    for name in ("first_scale", "second_scale"):
        if getattr(options, name):
            check_scale(getattr(options, name), f"--{name.replace('_', '-')}")
    if options.items is None:
        if options.resample == "prompt":
            raise UserError("--resample prompt needs --items, which tells each item's prompt")
        if needy := [name for name in options.slice if SLICES[name].needs_items]:
            raise UserError(f"--slice {needy[0]} needs --items, which tells it of each item")
    if options.output:
        check_folder(options.output)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("first", metavar="FIRST", help="verdicts held to be right: the gold judge's")
    add("second", metavar="SECOND", help="verdicts to measure")
    add("--items", metavar="FILE", help="the responses or pairs judged, for slices and prompts")
    add("--common", action="store_true", help="compare the items of both files where they differ")
    for which in ("first", "second"):
        add(f"--{which}-scale", nargs=2, type=float, metavar=("LOW", "HIGH"),
            help=f"Scale of the {which} file's scores, which are mapped to 0 to 9. Default: 0 9.")
    add("--label", choices=["first", "mean"], default="first",
        help="of an item with several answers: the first's, or their mean (%(default)s)")
    add("--resample", choices=["item", "prompt"], default="item",
        help="drawn for intervals; prompt where prompts have several items (%(default)s)")
    add("--slice", choices=sorted(SLICES), action="append", default=[], help="repeat for several")
    add("--resamples", type=int, default=1000, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the resamples (%(default)s)")
    add("--output", metavar="DIR", help="for agreement.json and agreement.png")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
