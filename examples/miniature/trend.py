"""How the difference between two rows changes with the size of the comparison.

    python -m examples.miniature.trend FOLDER [FOLDER ...] [--row ROW] [--against ROW]
        [--predict d12]

Each folder is one of `python -m examples.miniature`, with other sizes after `--`. The difference of
the rows' losses, seed by seed, is fitted as a linear function of the logarithms of the sizes that
the folders vary, with a constant for each text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from examples.miniature.rows import ROWS
from examples.quickstart.training import RECIPES, with_bases
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.recipe_files import read_recipe
from megatron_ext.typed_flags import flag, parse_config

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class TrendConfig:
    """Flags of the example."""

    folders: tuple[str, ...] = flag(positional=True, metavar="FOLDER")
    """Folders with a results.json each; the first is that of the smallest models."""
    row: str = flag("et-adaptive", choices=tuple(ROWS))
    """Row whose loss is compared."""
    against: str = flag("tc-aux-strong", choices=tuple(ROWS))
    """Row with which it is compared."""
    predict: Literal["d12", "d20"] | None = flag(None)
    """Recipe for whose sizes the difference is predicted. Default: none."""


@dataclass(frozen=True)
class Comparison:
    """Paired differences of a folder.

    Attributes:
        trained_with: Optimizer and recipes of the runs.
        text: Text of the runs; the empty string for that of the miniature.
        sizes: Value of each of `SIZES`.
        differences: Loss of the row minus that of the other in nats per token, one for each seed.
    """

    trained_with: tuple[str, str]
    text: str
    sizes: Mapping[str, float]
    differences: Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """Value with half the width of its 95 % interval."""

    value: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.half_width:.4f}"


SIZES = {
    "tokens": ("train_iters", "global_batch_size", "seq_length"),
    "tokens of a step": ("global_batch_size", "seq_length"),
    "layers": ("num_layers",),
    "width": ("hidden_size",),
    "routed experts": ("num_experts",),
    "routed experts per token": ("moe_router_topk",),
}
"""Names of the sizes, and the settings whose product each of them is."""


class Trend:
    """Linear fit of the differences by ordinary least squares.

    Attributes:
        varied: Names of the sizes that vary.
        origin: Sizes of the first comparison.

    Raises:
        UserError: The comparisons do not determine the fit.
    """

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        if len({one.trained_with for one in comparisons}) > 1:
            raise UserError(
                "The folders differ in the optimizer or the recipes. Give folders of one optimizer "
                "and one version."
            )
        self.origin = comparisons[0].sizes
        sizes = [one.sizes for one in comparisons]
        self.varied = [name for name in SIZES if len({of[name] for of in sizes}) > 1]
        self._texts = list(dict.fromkeys(one.text for one in comparisons))
        design = np.array(
            [self._terms(one.sizes, one.text) for one in comparisons for _ in one.differences]
        )
        observed = np.concatenate([one.differences for one in comparisons])
        if np.linalg.matrix_rank(design) < design.shape[1]:
            raise UserError(
                f"The folders do not separate the effects of {', '.join(self.varied)}"
                + (" and the texts" if len(self._texts) > 1 else "")
                + ". Add folders of which each pair varies one of them."
            )
        self._freedom = len(observed) - design.shape[1]
        if self._freedom < 1:
            raise UserError(
                "The folders have too few seeds for an interval. Train more seeds of both rows."
            )
        self._fit, *_ = np.linalg.lstsq(design, observed)
        residuals = observed - design @ self._fit
        self._covariance = np.linalg.inv(design.T @ design) * (residuals @ residuals)
        self._covariance /= self._freedom

    def per_doubling(self, name: str) -> Estimate:
        """Return the change of the difference if a size is doubled."""
        terms = np.zeros(len(self._fit))
        terms[len(self._texts) + self.varied.index(name)] = 1.0
        return self._estimate(terms)

    def at(self, sizes: Mapping[str, float]) -> Estimate:
        """Return the mean difference at other sizes, with the text of the first comparison."""
        return self._estimate(self._terms(sizes, self._texts[0]))

    def _terms(self, sizes: Mapping[str, float], text: str) -> np.ndarray:
        constants = [float(text == other) for other in self._texts]
        logs = [math.log2(sizes[name] / self.origin[name]) for name in self.varied]
        return np.array([*constants, *logs])

    def _estimate(self, terms: np.ndarray) -> Estimate:
        error = math.sqrt(terms @ self._covariance @ terms)
        quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, self._freedom)
        return Estimate(float(terms @ self._fit), float(error * quantile))


def read_comparison(folder: Path, row: str, other: str) -> Comparison:
    """Return the differences of two rows in a folder.

    Raises:
        UserError: The folder has no results, or no seed of both rows.
    """
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text())
        settings, rows = results["settings"], results["rows"]
        trained_with = settings["optimizer"], settings["recipes"]
        flags, text = list(settings["flags"]), " ".join(settings.get("text", ()))
        ours, theirs = (rows.get(name, {}).get("seeds", {}) for name in (row, other))
        common = sorted(ours.keys() & theirs.keys())
        differences = [float(ours[seed]["loss"]) - float(theirs[seed]["loss"]) for seed in common]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read. Give a folder that python -m examples.miniature has finished."
        ) from error
    if not differences:
        raise UserError(f"{file} has no seed of both {row} and {other}. Train them.")
    sizes = sizes_of(RECIPES / "miniature.yaml", flags)
    return Comparison(trained_with, text, sizes, differences)


def sizes_of(recipe: Path, flags: Sequence[str] = ()) -> dict[str, float]:
    """Return the sizes that a recipe with all settings of `SIZES` and further flags result in."""
    settings: dict[str, Any] = {}
    for file in reversed(with_bases(recipe)):
        settings |= read_recipe(file, ())
    parser = ToolParser(add_help=False, allow_abbrev=False)
    for name in dict.fromkeys(part for parts in SIZES.values() for part in parts):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=settings[name])
    values = vars(parser.parse_known_args(list(flags))[0])
    return {name: float(math.prod(values[part] for part in parts)) for name, parts in SIZES.items()}


def table(trend: Trend, comparisons: Sequence[Comparison], title: str) -> str:
    """Return the table of the changes per doubling."""
    lines = [f"| {title} | from | to | change per doubling |", "| --- | ---: | ---: | ---: |"]
    for name in trend.varied:
        values = [one.sizes[name] for one in comparisons]
        cells = [name, f"{min(values):,.0f}", f"{max(values):,.0f}", str(trend.per_doubling(name))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(TrendConfig, argv, "python -m examples.miniature.trend", __doc__)
    if options.row == options.against:
        raise UserError("--row and --against are the same row. Choose two.")
    comparisons = [
        read_comparison(Path(folder), options.row, options.against) for folder in options.folders
    ]
    trend = Trend(comparisons)
    print(table(trend, comparisons, f"{options.row} − {options.against}"))
    print(f"\nIn {options.folders[0]} the difference is {trend.at(trend.origin)} nats per token.")
    if options.predict:
        sizes = sizes_of(RECIPES / f"{options.predict}.yaml")
        factors = [f"{name} × {sizes[name] / trend.origin[name]:,.0f}" for name in trend.varied]
        print(
            f"Extrapolated to {options.predict} ({', '.join(factors)}), it is {trend.at(sizes)}. "
            "Sizes that no folder varies, and settings that are no sizes, have no part in this."
        )


if __name__ == "__main__":
    run_tool(main)
