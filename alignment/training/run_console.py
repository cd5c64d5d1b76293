"""Console output of a command that trains: start, one line for every report, and end.

All other output of every rank is in `train.log` of the run directory.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch.distributed as dist

from alignment.training.training_run import TrainingRun
from megatron_ext.console import console
from megatron_ext.report_lines import RemainingTime, clock, report_line, short, step_of

Metrics = Mapping[str, Any]

_SHOWN = {
    "reward": "reward {:.3f}",
    "loss": "loss {:.4f}",
    "kl_from_reference": "KL {:.4f}",
    "kl_from_old": "KL of the step {:.4f}",
    "entropy": "entropy {:.2f}",
    "length": "length {:.0f}",
    "cut_off": "cut off {:.0%}",
    "moe/fan_out": "fan-out {:.2f}",
    "moe/largest_load": "largest load {:.1f}x",
}
"""Metrics of a line in their order. KL from a reference replaces that of the step."""

_UNREWARDED = 0.05  # share of the responses above which a report raises an alarm
_MOST_EVALUATED = 6  # metrics in the line of an evaluation
_NOT_SHOWN = ("step", "_unjudged", "_error", "/prompts", "/alarm")  # ends of their names


class RunConsole:
    """Console of a training run, used as a context manager; only rank 0 prints."""

    def __init__(self, run: TrainingRun, steps: int, report_every: int) -> None:
        """Create the console.

        Args:
            run: Open run.
            steps: Number of the last step.
            report_every: Steps between two lines. There is also one after the first and the last.
        """
        self._run, self._steps, self._every = run, steps, report_every
        self._left = RemainingTime(steps)
        self._first: int | None = None
        self._tokens, self._seconds, self._skipped = 0.0, 0.0, 0
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        """Print the size of the model and the layout; a collective."""
        engine = self._run.engine
        total, active = engine.count_parameters()
        if self._run.writes:
            experts = "" if active == total else f", {short(active)} active per token"
            console.line(f"{'Model':9}{short(total)} parameters{experts}")
            ranks, shares = dist.get_world_size(), engine.data_size
            per_copy = f", {ranks // shares} for each copy of the model" if shares < ranks else ""
            console.line(f"{'Layout':9}{ranks} rank{'s' * (ranks > 1)}{per_copy}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Print how long the training took, if it reached its last step."""
        if kind is None and self._run.writes and self._run.step >= self._steps:
            seconds = clock(time.monotonic() - self._begin)
            console.line(f"{'Finished':9}{self._run.step:,} steps, {seconds}")

    def resume(self, step: int) -> None:
        """Record the step from which training starts, and print it if it is not the first."""
        self._first = step
        self._left.finish_step(step)
        if step and self._run.writes:
            console.line(f"{'Resumes':9}after step {step:,} of {self._steps:,}")

    def finish_step(self, step: int, metrics: Metrics) -> None:
        """Count a step, and print a line if a report is due."""
        if not self._run.writes:
            return
        self._left.finish_step(step)
        self._tokens += metrics.get("tokens", 0)
        self._seconds += metrics.get("seconds", 0)
        self._skipped += bool(metrics.get("skipped"))
        alarms = list(self._alarms(metrics))
        names = [name for name in _SHOWN if isinstance(metrics.get(name), int | float)]
        if "kl_from_reference" in names and "kl_from_old" in names:
            names.remove("kl_from_old")
        if "reward" in names and "loss" in names:  # it is 0 except for rounding
            names.remove("loss")
        parts = [
            step_of(step, self._steps),
            *(_SHOWN[name].format(metrics[name]) for name in names),
        ]
        if self._tokens and self._seconds:
            parts.append(f"{self._tokens / self._seconds:,.0f} tokens/s")
        line = report_line([*parts, str(self._left)], alarms)
        if step % self._every and step not in (self._steps, (self._first or 0) + 1):
            console.status(line)
            return
        (console.alarm if alarms else console.line)(line)
        self._tokens, self._seconds, self._skipped = 0.0, 0.0, 0

    def evaluate(self, step: int, metrics: Metrics) -> None:
        """Print the first metrics of an evaluation."""
        if self._run.writes:
            parts = [
                f"{_words(name)} {value:.4g}"
                for name, value in metrics.items()
                if isinstance(value, int | float) and not name.endswith(_NOT_SHOWN)
            ][:_MOST_EVALUATED]
            console.line(report_line([step_of(step, self._steps), "evaluation", *parts]), "bold")

    def _alarms(self, metrics: Metrics) -> Iterator[str]:
        values = [metrics.get("loss"), metrics.get("grad_norm"), metrics.get("reward")]
        if any(value is not None and not math.isfinite(value) for value in values):
            yield "loss, gradient or reward is not a finite number"
        if self._skipped:
            steps = f"{self._skipped} step{'s' * (self._skipped > 1)} skipped"
            yield f"{steps}, as no rewards of a prompt differ"
        if overflows := metrics.get("overflows"):
            yield f"{overflows:.0f} optimizer steps skipped, as gradients overflowed"
        if "loss" in metrics and "grad_norm" in metrics and metrics["grad_norm"] is None:
            yield "optimizer step skipped, as gradients overflowed"
        if (share := metrics.get("unrewarded") or 0) > _UNREWARDED:
            yield f"{share:.0%} of the responses without a reward"
        if count := metrics.get("monitor_alarms"):
            yield f"{count:.0f} monitor alarm{'s' * (count > 1)}"


def _words(name: str) -> str:
    """Return the name of an evaluation metric for a line of text."""
    return name.removeprefix("grade/").removeprefix("validation/").replace("_", " ")
