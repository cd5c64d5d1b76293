"""Command `et-align agreement`; its help is in `agreement_config`."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.commands.agreement_config import AgreementConfig, parse
from alignment.judges.formats.scale import read_verdicts
from alignment.statistics.agreement_measures import AgreementData, judge_measures
from alignment.statistics.agreement_pictures import draw
from alignment.statistics.agreement_text import (
    COMPARED,
    AgreementSummary,
    difference_table,
    table,
)
from alignment.statistics.bootstrap import LEVEL, Indices, estimates
from alignment.statistics.judge_difference import (
    AgreementDifference,
    agreement_differences,
    compared_items,
)
from alignment.statistics.slices import keys_of, read_items
from alignment.statistics.verdict_alignment import (
    align_verdicts,
    groups_of,
    shared_items,
    verdicts_by_item,
)
from megatron_ext.errors import TooFewResults, UserError
from megatron_ext.progress import Progress

# Slices beyond these would make a table that nobody reads.
_MOST_SLICES = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the command."""
    run(parse(argv))


def run(config: AgreementConfig) -> None:
    """Print the agreement of two judges and write it to the output folder.

    Raises:
        UserError: The files do not fit each other.
        TooFewResults: No item has a verdict in both files.
    """
    files = [Path(name) for name in (config.first, config.second, config.third) if name]
    names = [str(file) for file in files]
    scales = {
        "--first-scale": config.first_scale,
        "--second-scale": config.second_scale,
        "--third-scale": config.third_scale,
    }
    verdicts = [
        verdicts_by_item(read_verdicts(file, scale, flag, config.rows.options), str(file))
        for file, (flag, scale) in zip(files, scales.items())
    ]
    items = list(verdicts[0])
    for other, name in zip(verdicts[1:], names[1:]):
        shared = set(shared_items(verdicts[0], other, config.common, [names[0], name]))
        items = [item for item in items if item in shared]
    omitted = [len(each) - len(items) for each in verdicts]
    items = items[: config.rows.limit]
    # A limit counts the items that are compared, not those of --items.
    options = replace(config.rows.options, limit=None)
    rows = read_items(Path(config.items), items, options) if config.items else None
    judges = [align_verdicts(each, items, name) for each, name in zip(verdicts, names)]
    for judge, name in zip(judges[1:], names[1:]):
        if judge.pairwise != judges[0].pairwise:
            raise UserError(
                f"{names[0]} and {name} cannot be compared: one has scores and the other has "
                "preferences. Give files of one kind."
            )
    compared = AgreementData(judges[0], judges[1], config.label == "mean")
    keys = items
    if config.resample == "prompt":
        assert rows is not None
        keys = [row.prompt.id for row in rows]
    slices: dict[str, dict[str, Indices]] = {
        name: keys_of(name, compared, rows, _MOST_SLICES) for name in config.slice
    }
    steps = 1 + sum(len(parts) for parts in slices.values()) + len(judges[2:])
    with Progress("resampling", steps * config.resamples, "resamples") as progress:
        done = itertools.count(1)
        measure = partial(
            _part, compared, keys, config.resamples, config.seed,
            lambda: progress.update(next(done)),
        )  # fmt: skip
        overall = measure(np.arange(len(items)))
        parts: dict[str, dict[str, AgreementSummary]] = {
            name: {key: measure(places) for key, places in slice_places.items()}
            for name, slice_places in slices.items()
        }
        differences: dict[str, AgreementDifference] = {}
        if len(judges) > 2:
            differences = agreement_differences(
                judges[0], (judges[1], judges[2]), COMPARED[judges[0].pairwise], keys,
                config.resamples, seed=config.seed, permutations=config.resamples,
                use_mean=config.label == "mean", advance=lambda: progress.update(next(done)),
            )  # fmt: skip
    if any(omitted):
        counts = [f"{n:,} of the {len(v):,} items of {name}"
                  for n, v, name in zip(omitted, verdicts, names) if n]  # fmt: skip
        print(f"--common omits {', '.join(counts)}, which the others lack.\n")
    print(table(judges[0].pairwise, overall, parts))
    if differences:
        compared_by_all = compared_items(judges[0], (judges[1], judges[2]), config.label == "mean")
        print("\n" + difference_table(differences, names, len(compared_by_all)))
    if config.output:
        _write(Path(config.output), compared, names, overall, parts, differences, config)
    if not overall.judged_by_both:
        raise TooFewResults(
            f"None of the {len(items):,} items was judged successfully in both {names[0]} and "
            f"{names[1]}, so that there is nothing to compare."
        )


def _part(
    compared: AgreementData,
    keys: Sequence[str],
    resamples: int,
    seed: int,
    advance: Callable[[], None],
    places: Indices,
) -> AgreementSummary:
    """Return all statistics of the items at some places."""
    groups = [places[group] for group in groups_of([keys[place] for place in places])]
    both, *each = compared.agreement(), judge_measures(compared.a), judge_measures(compared.b)
    # One call, so that all measures have the same resamples.
    named: dict[tuple[int, str], Callable[[Indices], float]] = {
        (number, name): measure
        for number, measures in enumerate([both, *each])
        for name, measure in measures.items()
    }
    results = estimates(named, groups, resamples, seed, advance)
    split = [{n: e for (at, n), e in results.items() if at == number} for number in range(3)]
    a, b = compared.labels()
    judged_by_both = int((~np.isnan(a[places]) & ~np.isnan(b[places])).sum())
    return AgreementSummary(len(places), judged_by_both, split[0], split[1:])


def _write(
    folder: Path,
    compared: AgreementData,
    names: Sequence[str],
    overall: AgreementSummary,
    parts: Mapping[str, Mapping[str, AgreementSummary]],
    differences: Mapping[str, AgreementDifference],
    config: AgreementConfig,
) -> None:
    labels, counts = compared.confusion()
    content: dict[str, Any] = {
        "first": {"file": names[0], "judges": compared.a.identities},
        "second": {"file": names[1], "judges": compared.b.identities},
        "resampled": config.resample,
        "resamples": config.resamples,
        "level": LEVEL,
        "label": config.label,
        "all": overall.to_json(),
        "slices": {
            name: {key: part.to_json() for key, part in slice_parts.items()}
            for name, slice_parts in parts.items()
        },
        "confusion": {"labels": labels, "counts": counts.tolist()},
        "calibration": [
            {"second": b, "first": a, "items": count} for b, a, count in compared.calibration()
        ],
    }
    if differences:
        content["differences"] = {
            "third": {"file": names[2]},
            "figures": {name: asdict(result) for name, result in differences.items()},
        }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "agreement.json"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(file)
    draw(compared, [Path(name).stem for name in names], folder / "agreement.png")
    print(f"\nWrote {file} and {folder / 'agreement.png'}.")
