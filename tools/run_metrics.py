"""A run's `metrics.jsonl` as arrays over steps."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import UserError

Floats = NDArray[np.float64]
Row = dict[str, Any]


def read_rows(path: Path, advice: str) -> list[Row]:
    """The objects of a file of JSON lines; a last line that is still being written is left out.

    Args:
        advice: to a user whose file is not there.

    Raises:
        UserError: no file, or a damaged one.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {advice}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:  # also of a letter that is cut in half
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error
    return [row for row in rows if isinstance(row, dict)]


class RunMetrics:
    """Rows of an unfinished, resumed or finished run.

    Attributes:
        training: rows with a training loss, by step; a step written twice counts as it was last.
        evaluations: validation loss by step.
    """

    def __init__(self, rows: list[Row]) -> None:
        training = {row["step"]: row for row in rows if row.get("loss") is not None}
        self.training: list[Row] = [training[step] for step in sorted(training)]
        evaluated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
        self.evaluations: dict[int, float] = dict(sorted(evaluated.items()))

    @classmethod
    def read(cls, run_dir: Path) -> "RunMetrics":
        """Read a run directory; a last line that is still being written is left out.

        Raises:
            UserError: no file, a damaged one, or one without a training step.
        """
        path = run_dir / "metrics.jsonl"
        rows = read_rows(path, "give the directory of a run")
        metrics = cls([row for row in rows if "step" in row])
        if not metrics.training:
            raise UserError(f"{path} has no training step yet: wait for the first")
        return metrics

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers, counted from 0 over all layers."""
        names = (re.match(r"moe/layer_(\d+)/", name) for row in self.training for name in row)
        return sorted({int(name[1]) for name in names if name})

    def series(self, name: str, layer: int | None = None) -> tuple[Floats, Floats]:
        """Steps `[n]` and values, `[n]` or `[n, experts]`, of the rows that have the figure."""
        key = name if layer is None else f"moe/layer_{layer:02d}/{name}"
        rows = [row for row in self.training if row.get(key) is not None]
        steps = np.array([row["step"] for row in rows], dtype=float)
        return steps, np.array([row[key] for row in rows], dtype=float)

    def over_layers(self, name: str) -> tuple[Floats, Floats]:
        """Steps `[n]` and values `[layers, n]` of a scalar that every MoE layer has."""
        found = [dict(zip(*self.series(name, layer))) for layer in self.layers]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        return np.array(steps), np.array([[values[step] for step in steps] for values in found])

    def recent(self, name: str, layer: int | None = None) -> Any:
        """Mean over the last tenth of the run, a number or `[experts]`; None if never logged."""
        steps, values = self.series(name, layer)
        if not len(steps):
            return None
        first = min(self.last_step * 0.9, steps[-1])
        return values[steps >= first].mean(axis=0)

    @property
    def last_step(self) -> int:
        """The last optimizer step in the log."""
        return int(self.training[-1]["step"])

    @cached_property
    def warmup_end(self) -> int | None:
        """Last step that routed by expert choice, whose loads are all equal; None if none did.

        A run that stayed with expert choice to its last row has no end of a warm-up either.
        """
        steps, imbalance = self.over_layers("load_max_over_mean")
        uneven = np.flatnonzero((imbalance > 1 + 1e-6).any(axis=0))
        return int(steps[uneven[0] - 1]) if len(uneven) and uneven[0] else None

    @cached_property
    def target_rate(self) -> float | None:
        """Share of its pool that an expert takes on average, as the warm-up shows; or None."""
        if not self.warmup_end:
            return None
        steps, fan_out = self.over_layers("fan_out")
        _, tokens_by_fan_out = self.series("fan_out_histogram", self.layers[0])
        experts = tokens_by_fan_out.shape[-1] - 1
        return float(fan_out[:, steps <= self.warmup_end].mean() / experts) if experts > 0 else None
