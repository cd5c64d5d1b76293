"""Metrics of a run, read from `metrics.jsonl` as arrays over steps."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import UserError
from megatron_ext.json_numbers import load_json

Floats = NDArray[np.float64]
Row = dict[str, Any]


def read_rows(path: Path, advice: str, parse: Callable[[bytes], Any] = json.loads) -> list[Row]:
    """Return the objects of a JSON Lines file, without an incomplete last line.

    Args:
        path: File to read.
        advice: Instruction for the user if the file cannot be read; ends the error message.
        parse: Function that parses a line, `load_json` for metrics.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {advice}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(parse(line))
        except ValueError as error:  # also raised for a character that is cut in half
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error
    return [row for row in rows if isinstance(row, dict)]


@dataclass(frozen=True)
class TrainingWork:
    """Work behind each training row of a run.

    Attributes:
        steps: Optimizer steps `[rows]`.
        tokens: Tokens trained on up to and including the step, `[rows]`.
        flops: FLOPs of the steps since the previous row by Megatron's formula, `[rows]`; None if
            the rows do not determine them.
        device_seconds: Time of all devices for these steps in seconds, `[rows]`; None if the rows
            do not determine it.
    """

    steps: Floats
    tokens: Floats
    flops: Floats | None
    device_seconds: Floats | None


class RunMetrics:
    """Metrics of an unfinished, resumed or finished run.

    Attributes:
        training: Rows with a training loss, ordered by step. The last row of a repeated step
            counts.
        evaluations: Validation loss by step, in nats per token; it may be not finite.
    """

    def __init__(self, rows: list[Row]) -> None:
        training = {row["step"]: row for row in rows if row.get("loss") is not None}
        self.training: list[Row] = [training[step] for step in sorted(training)]
        evaluated = {row["step"]: row for row in rows if row.get("val_loss") is not None}
        self.evaluations = {step: float(evaluated[step]["val_loss"]) for step in sorted(evaluated)}

    @classmethod
    def read(cls, run_dir: Path) -> "RunMetrics":
        """Read the metrics in a run directory, without an incomplete last line.

        Raises:
            UserError: The file cannot be read, is damaged, or has no training step.
        """
        path = run_dir / "metrics.jsonl"
        rows = read_rows(path, "Name the directory of a run.", load_json)
        metrics = cls([row for row in rows if "step" in row])
        if not metrics.training:
            raise UserError(f"{path} has no training step yet. Wait for the first one.")
        return metrics

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers, counted from 0 over all layers."""
        names = (re.match(r"moe/layer_(\d+)/", name) for row in self.training for name in row)
        return sorted({int(name[1]) for name in names if name})

    def series(self, name: str, layer: int | None = None) -> tuple[Floats, Floats]:
        """Return the values of a metric in all rows that have it.

        Args:
            name: Name of the metric, without the prefix of its layer.
            layer: Number of the MoE layer; None for a metric of the whole model.

        Returns:
            Steps `[n]`, and values `[n]` or `[n, experts]`.
        """
        key = name if layer is None else f"moe/layer_{layer:02d}/{name}"
        rows = [row for row in self.training if row.get(key) is not None]
        steps = np.array([row["step"] for row in rows], dtype=float)
        return steps, np.array([row[key] for row in rows], dtype=float)

    def over_layers(self, name: str) -> tuple[Floats, Floats]:
        """Return steps `[n]` and values `[layers, n]` of a scalar that every MoE layer has."""
        by_layer = [dict(zip(*self.series(name, layer))) for layer in self.layers]
        steps = sorted(set.intersection(*map(set, by_layer))) if by_layer else []
        return np.array(steps), np.array([[values[step] for step in steps] for values in by_layer])

    def recent(self, name: str, layer: int | None = None) -> Any:
        """Return the mean over the last tenth of the run, a number or `[experts]`, or None."""
        steps, values = self.series(name, layer)
        if not len(steps):
            return None
        first = min(self.last_step * 0.9, steps[-1])
        return values[steps >= first].mean(axis=0)

    def recorded(self, name: str) -> str:
        """Return the values of a metric and the steps at which it changed; empty if never logged.

        >>> rows = [{"step": step, "loss": 3.0, "world_size": 2 * step} for step in (1, 2)]
        >>> RunMetrics(rows).recorded("world_size")
        '2, 4 from step 2'
        """
        points = [(row["step"], row[name]) for row in self.training if row.get(name) is not None]
        changes = [
            f"{value} from step {step}"
            for (step, value), (_, before) in zip(points[1:], points)
            if value != before
        ]
        return ", ".join([str(points[0][1]), *changes]) if points else ""

    def work(self, settings: Mapping[str, Any]) -> TrainingWork:
        """Return the tokens, FLOPs and device time of every training row.

        Rows of older versions lack some values. Their FLOPs per token are those of the rows that
        record them, or follow from the world size in the settings.

        Args:
            settings: Settings from run.json. `global_batch_size`, `seq_length` and `world_size`
                complete rows that lack them.
        """
        steps, tokens = self._steps_and_tokens(settings)
        gained = np.diff(tokens, prepend=0.0)
        per_token = _column(self.training, "flops_per_token")
        speeds, rates = (
            _column(self.training, n) for n in ("flops_per_s_per_device", "tokens_per_s")
        )
        finite = per_token[np.isfinite(per_token)]
        if len(finite):
            default = finite[0]
        elif (world := settings.get("world_size")) is not None:
            default = speeds[-1] * world / rates[-1]
        else:
            default = np.nan
        flops = gained * np.where(np.isfinite(per_token), per_token, default)
        # A row may cover steps that were not logged; their duration is assumed to be the same.
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
        """Return steps and cumulative tokens, `[rows]` each; the tokens never decrease.

        Rows of older versions count samples times the sequence length of the current start, which
        decreased when a run was resumed with shorter sequences. In such a row, a step is assumed
        to have as many tokens as the next one.
        """
        steps = _column(self.training, "step")
        tokens = _column(self.training, "tokens")
        sizes = _column(self.training, "batch_size") * _column(self.training, "seq_length")
        if not np.isfinite(tokens).all():
            tokens_per_step = settings.get("global_batch_size", np.nan) * settings.get(
                "seq_length", np.nan
            )
            tokens = np.where(np.isfinite(tokens), tokens, steps * tokens_per_step)
        gained = np.diff(tokens, prepend=0.0)
        rows = np.diff(steps, prepend=0.0)
        for row in reversed(range(len(gained))):
            if np.isfinite(sizes[row]) and rows[row] == 1:
                gained[row] = sizes[row]
            elif gained[row] <= 0:
                later = row + 1 < len(gained)
                gained[row] = rows[row] * (gained[row + 1] / rows[row + 1] if later else 0)
        return steps, np.cumsum(gained)

    @cached_property
    def divergence(self) -> str:
        """Clause on the steps whose losses are not finite; empty if all are finite.

        >>> rows = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, math.nan))]
        >>> RunMetrics(rows).divergence
        'the training loss is not finite from step 2 on'
        """
        losses = {
            "training": {row["step"]: float(row["loss"]) for row in self.training},
            "validation": self.evaluations,
        }
        clauses = (_not_finite(f"{name} loss", by_step) for name, by_step in losses.items())
        return ", and ".join(filter(None, clauses))

    @property
    def last_step(self) -> int:
        """Last optimizer step in the log."""
        return int(self.training[-1]["step"])

    @cached_property
    def warmup_end(self) -> int | None:
        """Last step of the expert-choice warm-up, in which all loads are equal; None without one.

        The value is also None if the warm-up has not ended by the last row.
        """
        steps, imbalance = self.over_layers("load_max_over_mean")
        uneven = np.flatnonzero((imbalance > 1 + 1e-6).any(axis=0))
        return int(steps[uneven[0] - 1]) if len(uneven) and uneven[0] else None

    @cached_property
    def target_rate(self) -> float | None:
        """Mean share of the tokens that an expert takes in the warm-up; None without a warm-up."""
        if not self.warmup_end:
            return None
        steps, fan_out = self.over_layers("fan_out")
        _, tokens_by_fan_out = self.series("fan_out_histogram", self.layers[0])
        experts = tokens_by_fan_out.shape[-1] - 1
        return float(fan_out[:, steps <= self.warmup_end].mean() / experts) if experts > 0 else None


def refuse_policy_run(run_dir: Path) -> None:
    """Refuse the folder of a run that trained a policy, which et-align report shows.

    Raises:
        UserError: The run is one of et-align train-policy.
    """
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(record, dict) and isinstance(record.get("judge"), dict):
        raise UserError(
            f"{run_dir} is a run of et-align train-policy. Use et-align report {run_dir}."
        )


def _column(rows: list[Row], name: str) -> Floats:
    """Return a metric of every row, `[rows]`; NaN where a row lacks it."""
    return np.array([np.nan if (v := row.get(name)) is None else v for row in rows], dtype=float)


def _not_finite(name: str, losses: Mapping[int, float]) -> str:
    """Return a clause on the losses that are not finite, by step in ascending order."""
    steps = [step for step, loss in losses.items() if not math.isfinite(loss)]
    if not steps:
        return ""
    if len(steps) == sum(step >= steps[0] for step in losses):
        return f"the {name} is not finite from step {steps[0]:,} on"
    return f"the {name} is not finite at {len(steps):,} steps, first at step {steps[0]:,}"


def summary(validation: dict[str, Any]) -> str:
    """Return a line with the losses of a run; empty without a validation loss.

    >>> summary({"validation": 3.9, "unigram": 6.4, "bigram": 4.4})
    'validation 3.900 against unigram 6.400, bigram 4.400 (nats per token)'
    """
    if "validation" not in validation:
        return ""
    baselines = [f"{n} {validation[n]:.3f}" for n in ("unigram", "bigram") if n in validation]
    against = f" against {', '.join(baselines)}" if baselines else ""
    return f"validation {validation['validation']:.3f}{against} (nats per token)"
