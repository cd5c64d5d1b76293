"""The table of all rows, with paired differences."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.miniature.compute_table import NOTE, compute_figures, compute_table
from examples.miniature.picture import draw_differences
from examples.miniature.rows import REFERENCES, ROWS, Row
from megatron_ext.errors import UserError
from megatron_ext.reports.comparison.compare import compare
from megatron_ext.reports.comparison.compared_runs import ComparedRun, read_runs
from megatron_ext.reports.comparison.final_metrics import (
    load_ratio,
    tokens_per_second,
    worst_load_ratio,
)


def write_table(
    output: Path,
    rows: Sequence[Row],
    seeds: Sequence[int],
    settings: dict[str, Any],
    failed: Collection[str] = (),
) -> str:
    """Write table.md, results.json, pictures and the comparison of all runs; return the table.

    Args:
        output: Folder of the runs. The table also has the rows and seeds of its results.json, whose
            runs may be gone.
        rows: Trained rows.
        seeds: Trained seeds.
        settings: What all runs share.
        failed: Runs that the table leaves out.

    Raises:
        UserError: The results in the folder are of runs with other settings.
    """
    earlier = earlier_results(output, settings)
    seeds_of = {row: [seed for seed in seeds if row.run(seed) not in failed] for row in rows}
    names = [row.run(seed) for row in rows for seed in seeds_of[row]]
    runs = dict(zip(names, read_runs([str(output / name) for name in names])))
    figures = {row.name: dict(earlier.get(row.name, {})) for row in ROWS.values()}
    for row, finished in seeds_of.items():
        for seed in finished:
            figures[row.name][seed] = _figures(runs[row.run(seed)], output / row.run(seed))
    figures = {name: by_seed for name, by_seed in figures.items() if by_seed}
    if len(names) > 1:
        compare([str(output / name) for name in names], output, None)
    complete = {row.name: row for row in rows if len(seeds_of[row]) == len(seeds)}
    reference = next((name for name in REFERENCES if name in complete), None)
    if reference and len(complete) > 1:
        by_row = {row.label: [runs[row.run(seed)] for seed in seeds] for row in complete.values()}
        draw_differences(by_row, ROWS[reference].label, output / "differences.png")
    results: dict[str, Any] = {
        name: {
            "label": ROWS[name].label,
            "seeds": {str(seed): by_seed[seed] for seed in sorted(by_seed)},
            "difference": {
                other: _paired(by_seed, figures[other])
                for other in REFERENCES
                if other in figures and other != name and by_seed.keys() & figures[other].keys()
            },
        }
        for name, by_seed in figures.items()
    }
    table = "\n".join(_table(results))
    computed: dict[str, Sequence[dict[str, Any]]] = {
        str(row["label"]): [seed["compute"] for seed in row["seeds"].values()]
        for row in results.values()
        if all(seed["compute"] for seed in row["seeds"].values())
    }
    smallest = smallest_difference([row["seeds"] for row in results.values()])
    parts = [table, _NOTE if smallest is None else f"{_NOTE} {_SMALLEST.format(smallest)}"]
    if computed:
        parts += ["\n".join(compute_table(computed)), NOTE]
    contents = {"settings": settings, "rows": results, "smallest_difference": smallest}
    _write(output / "results.json", json.dumps(contents, indent=1) + "\n")
    _write(output / "table.md", "\n\n".join(parts) + "\n")
    return table


_NOTE = (
    "Loss in nats per token on all held-out tokens, routed causally, after training: mean ± "
    "standard deviation over seeds. Differences are from each token-choice row, seed by seed: mean "
    "± half the width of the 95 % interval (Student's t). Gap: by how much the loss falls when "
    "held-out tokens are routed as in training, by pools or within capacity. Load is the busiest "
    "expert's tokens over the mean, in the last tenth of the steps: mean of the layers, and the "
    "worst layer."
)


_SMALLEST = (
    "With the variance between seeds pooled over the rows that have all seeds, two of these rows "
    "differ with 95 % confidence if their means differ by {:.4f} or more."
)


def smallest_difference(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return half the width of the 95 % interval of a difference of two rows' mean losses.

    The variance is that of the losses about the sum of a row's mean and a seed's mean, pooled over
    all rows that have every seed, where the interval of a single pair has few degrees of freedom.

    Args:
        rows: Figures of each row by seed.

    Returns:
        Difference in nats per token; None for a single row or seed.
    """
    seeds = {seed for row in rows for seed in row}
    losses = np.array(
        [[row[seed]["loss"] for seed in seeds] for row in rows if seeds == row.keys()]
    )
    if min(losses.shape, default=0) < 2 or losses.ndim < 2:
        return None
    count, of_each = losses.shape
    residuals = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    freedom = (count - 1) * (of_each - 1)
    deviation = ((residuals**2).sum() / freedom * 2 / of_each) ** 0.5
    return float(deviation * stats.t.ppf(0.975, freedom))


def _figures(run: ComparedRun, folder: Path) -> dict[str, Any]:
    validated = json.loads((folder / "validation.json").read_text())["routings"]
    causal, *as_trained = [routing["loss"] for routing in validated]
    return {
        "loss": causal,
        "gap": causal - as_trained[0] if as_trained else None,
        "load": load_ratio(run),
        "worst_load": worst_load_ratio(run),
        "tokens": run.tokens,
        "tokens_per_s": tokens_per_second(run),
        "compute": compute_figures(run, validated[0]),
    }


def earlier_results(output: Path, settings: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Return the figures of each row and seed in the results.json of a folder.

    Args:
        output: Folder of the runs.
        settings: What all runs share.

    Raises:
        UserError: The file is of runs with other settings, or cannot be read.
    """
    file = output / "results.json"
    if not file.exists():
        return {}
    try:
        contents = json.loads(file.read_text())
        rows = {
            name: {int(seed): figures for seed, figures in row["seeds"].items()}
            for name, row in contents["rows"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file} cannot be read. Remove it.") from error
    if contents.get("settings") != settings:
        raise UserError(
            f"{file} has results of other settings. Remove it, or choose another --output."
        )
    return rows


def _losses(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([figures["loss"] for figures in rows], dtype=float)


def _paired(ours: dict[int, Any], theirs: dict[int, Any]) -> dict[str, Any]:
    """Return the mean difference over common seeds, and half its interval or None for one."""
    common = sorted(ours.keys() & theirs.keys())
    differences = np.array([ours[seed]["loss"] - theirs[seed]["loss"] for seed in common])
    count = len(differences)
    half_width = None
    if count > 1:
        error = differences.std(ddof=1) / count**0.5
        half_width = float(error * stats.t.ppf(0.975, count - 1))
    return {"mean": float(differences.mean()), "half_width": half_width, "seeds": common}


def _table(results: dict[str, Any]) -> list[str]:
    references = [name for name in REFERENCES if name in results]
    header = ["", "seeds", "validation loss", *(f"− {ROWS[name].label}" for name in references)]
    header += ["gap", "load", "tokens/s"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in results.values():
        seeds = list(row["seeds"].values())
        losses = _losses(seeds)
        spread = f" ± {losses.std(ddof=1):.4f}" if len(losses) > 1 else ""
        cells = [row["label"], ", ".join(row["seeds"]), f"{losses.mean():.4f}{spread}"]
        for other in references:
            pair = row["difference"].get(other)
            cells.append("" if pair is None else _difference(pair))
        loads = [f"{_mean(seeds, key):.2f}" for key in ("load", "worst_load") if _has(seeds, key)]
        cells += [f"{_mean(seeds, 'gap'):+.4f}" if _has(seeds, "gap") else ""]
        cells += [", ".join(loads), f"{_mean(seeds, 'tokens_per_s'):,.0f}"]
        lines.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _difference(pair: dict[str, Any]) -> str:
    half_width = pair["half_width"]
    return f"{pair['mean']:+.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")


def _has(seeds: Sequence[dict[str, Any]], key: str) -> bool:
    return all(figures[key] is not None for figures in seeds)


def _mean(seeds: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([figures[key] for figures in seeds]))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
