"""Common parts of all training loops: resuming, evaluation, checkpoints, signals and console."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from alignment.training.run_console import RunConsole
from alignment.training.training_run import StoppedBySignal, TrainingRun
from megatron_ext.console import console
from megatron_ext.errors import UserError

Metrics = Mapping[str, Any]


class EvaluationFailed(UserError):
    """Failure of an evaluation. All ranks raise it, so that they can still save the model."""


@dataclass(frozen=True)
class TrainingSchedule:
    """Length of a training, and when to evaluate and to save the model.

    Attributes:
        steps: Number of steps.
        save_every: Steps between checkpoints. There is also one after the last step.
        evaluate_every: Steps between evaluations. There is also one after the last step.
        best: Metric of an evaluation whose highest value marks the best model.
        sound: Function that returns whether an evaluation covers enough items to mark a model.
        stop_when: Function that returns the reason for ending the run after an evaluation, or None.
        report_every: Steps between two lines on the console.
    """

    steps: int
    save_every: int
    evaluate_every: int
    best: str | None = None
    sound: Callable[[Metrics], bool] = lambda metrics: True
    stop_when: Callable[[Metrics], str | None] = lambda metrics: None
    report_every: int = 1

    def evaluates_after(self, step: int) -> bool:
        """Return whether the model is evaluated after a number of steps."""
        return step % self.evaluate_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Return whether the model is saved after a number of steps."""
        return step % self.save_every == 0 or step == self.steps


def fit(
    run: TrainingRun,
    schedule: TrainingSchedule,
    train: Callable[[int], Metrics],
    evaluate: Callable[[int], Metrics] | None = None,
) -> int:
    """Train from the current step of a run to the last one, with one function per step.

    Args:
        run: Directory of the run, with the engine.
        schedule: Number of steps, and when to evaluate and to save.
        train: Function that does a step, counted from 0, and returns its metrics.
        evaluate: Function that returns metrics of the model after a number of steps. It is also
            called before the first step.

    Returns:
        The number of the signal that stopped the run, or 0.
    """
    lines = RunConsole(run, schedule.steps, schedule.report_every)
    with lines, stop_on_signal(run) as stop:
        resume(run, schedule, lines, evaluate)
        while run.step < schedule.steps and not run.ended:
            run.check_signals()
            begin = time.perf_counter()
            metrics = train(run.step)
            metrics = {**metrics, "seconds": time.perf_counter() - begin}
            run.finish_step(metrics)
            lines.finish_step(run.step, metrics)
            if schedule.evaluates_after(run.step):
                record_evaluation(run, schedule, lines, evaluate)
            if schedule.saves_after(run.step) or run.ended:
                run.save()
    return stop.signal


def resume(
    run: TrainingRun,
    schedule: TrainingSchedule,
    lines: RunConsole,
    evaluate: Callable[[int], Metrics] | None,
) -> None:
    """Load the newest checkpoint if there is one, and run a pending evaluation."""
    run.resume()
    run.note(steps=schedule.steps)
    lines.resume(run.step)
    if schedule.evaluates_after(run.step) and not run.evaluated:
        record_evaluation(run, schedule, lines, evaluate)
        if run.step:
            run.save()


def record_evaluation(
    run: TrainingRun,
    schedule: TrainingSchedule,
    lines: RunConsole,
    evaluate: Callable[[int], Metrics] | None,
) -> None:
    """Evaluate the model, log and print its metrics, and export it if it is the best so far.

    Raises:
        EvaluationFailed: There are no metrics. The model is saved first.
    """
    if evaluate is None:
        return
    try:
        metrics = evaluate(run.step)
    except EvaluationFailed:
        if run.step > run.saved:
            run.save()
        raise
    run.evaluated = True
    run.log({"step": run.step, **metrics})
    lines.evaluate(run.step, metrics)
    # The metric of an untrained judge may be undefined.
    value = metrics.get(schedule.best) if schedule.best is not None else None
    if schedule.best is not None and value is not None:
        run.keep_best(schedule.best, value, schedule.sound(metrics))
    run.ended = schedule.stop_when(metrics) or ""


@dataclass
class StopSignal:
    """Number of the signal that stopped a training, or 0."""

    signal: int = 0


@contextmanager
def stop_on_signal(run: TrainingRun) -> Iterator[StopSignal]:
    """Save the model and leave the block after a signal; report why training ended."""
    stop = StopSignal()
    try:
        yield stop
    except StoppedBySignal as stopped:
        stop.signal = stopped.number
        if run.step > run.saved:
            run.save()
        if run.writes:
            console.line(f"{stopped} after step {run.step}. Run the same command again to resume.")
        return
    if run.ended and run.writes:
        console.alarm(f"Stopped after step {run.step}: {run.ended}")
