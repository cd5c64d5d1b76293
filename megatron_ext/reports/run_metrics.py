"""A run's `metrics.jsonl` as arrays over steps."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TrainingWork:
    """What each training row of a run stands for.

    Attributes:
        steps: optimizer steps `[rows]`.
        tokens: trained on up to and with the step.
        flops: of the step by Megatron's formula; None where the rows do not tell.
        device_seconds: of all devices in the step; None where the rows do not tell.
    """

    steps: Floats
    tokens: Floats
    flops: Floats | None
    device_seconds: Floats | None


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

    def recorded(self, name: str) -> str:
        """Return the values that a figure of the rows had and since which step, empty if none.

        >>> rows = [{"step": step, "loss": 3.0, "world_size": 2 * step} for step in (1, 2)]
        >>> RunMetrics(rows).recorded("world_size")
        '2, 4 from step 2'
        """
        known = [(row["step"], row[name]) for row in self.training if row.get(name) is not None]
        changes = [
            f"{value} from step {step}"
            for (step, value), (_, before) in zip(known[1:], known)
            if value != before
        ]
        return ", ".join([str(known[0][1]), *changes]) if known else ""

    def work(self, settings: Mapping[str, Any]) -> TrainingWork:
        """Return tokens, FLOPs and device time of every row, from the row itself.

        Rows of versions that did not record them are completed: their FLOPs per token are those of
        the rows that have it, or follow from the world size of the settings.

        Args:
            settings: of run.json; `global_batch_size`, `seq_length` and `world_size` are read for
                rows that lack them.
        """
        steps, tokens = self._steps_and_tokens(settings)
        gained = np.diff(tokens, prepend=0.0)
        per_token = _column(self.training, "flops_per_token")
        speeds, rates = (
            _column(self.training, n) for n in ("flops_per_s_per_device", "tokens_per_s")
        )
        known = per_token[np.isfinite(per_token)]
        if len(known):
            default = known[0]
        elif (world := settings.get("world_size")) is not None:
            default = speeds[-1] * world / rates[-1]
        else:
            default = np.nan
        flops = gained * np.where(np.isfinite(per_token), per_token, default)
        # A row may stand for steps that were not logged: then all of them were as long as this.
        names = ("batch_size", "seq_length", "seconds", "world_size")
        batch, length, seconds, world_size = (_column(self.training, name) for name in names)
        recorded = seconds * world_size * gained / (batch * length)
        device_seconds = np.where(np.isfinite(recorded), recorded, flops / speeds)
        return TrainingWork(
            steps,
            tokens,
            flops if np.isfinite(flops).all() else None,
            device_seconds if np.isfinite(device_seconds).all() else None,
        )

    def _steps_and_tokens(self, settings: Mapping[str, Any]) -> tuple[Floats, Floats]:
        """Steps and tokens so far `[rows]`; tokens never fall.

        Older rows hold samples times the sequence length of their start, which fell when a run
        was resumed with shorter sequences: there the next step says how many tokens one has.
        """
        steps = _column(self.training, "step")
        tokens = _column(self.training, "tokens")
        sizes = _column(self.training, "batch_size") * _column(self.training, "seq_length")
        if not np.isfinite(tokens).all():
            usual = settings.get("global_batch_size", np.nan) * settings.get("seq_length", np.nan)
            tokens = np.where(np.isfinite(tokens), tokens, steps * usual)
        gained = np.diff(tokens, prepend=0.0)
        rows = np.diff(steps, prepend=0.0)
        for row in reversed(range(len(gained))):
            if np.isfinite(sizes[row]) and rows[row] == 1:
                gained[row] = sizes[row]
            elif gained[row] <= 0:
                later = row + 1 < len(gained)
                gained[row] = rows[row] * (gained[row + 1] / rows[row + 1] if later else 0)
        return steps, np.cumsum(gained)

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


def _column(rows: list[Row], name: str) -> Floats:
    """Return a figure of every row, NaN where a row does not have it."""
    return np.array([np.nan if (v := row.get(name)) is None else v for row in rows], dtype=float)


def summary(validation: dict[str, Any]) -> str:
    """The run in one line, as far as its losses are known; empty when none is.

    >>> summary({"validation": 3.9, "unigram": 6.4, "bigram": 4.4})
    'validation 3.900 against unigram 6.400, bigram 4.400 (nats per token)'
    """
    if "validation" not in validation:
        return ""
    known = [f"{n} {validation[n]:.3f}" for n in ("unigram", "bigram") if n in validation]
    against = f" against {', '.join(known)}" if known else ""
    return f"validation {validation['validation']:.3f}{against} (nats per token)"
