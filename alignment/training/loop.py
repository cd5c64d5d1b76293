"""The loop of every training here: steps, evaluations, checkpoints, signals."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from alignment.training.training_run import StoppedBySignal, TrainingRun
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

Row = Mapping[str, Any]


class EvaluationFailed(UserError):
    """No figures could be had; raised on all ranks, which can still save what they trained."""


@dataclass(frozen=True)
class TrainingSchedule:
    """How long a training is, and what happens on the way.

    Attributes:
        steps: in all.
        save_every, evaluate_every: steps; both also happen after the last.
        best: the figure of an evaluation whose highest value marks the model to keep.
        sound: whether an evaluation's figures stand for enough items to mark a model.
        stop_when: tells why an evaluation is the last one, or nothing.
    """

    steps: int
    save_every: int
    evaluate_every: int
    best: str | None = None
    sound: Callable[[Row], bool] = lambda row: True
    stop_when: Callable[[Row], str | None] = lambda row: None


def fit(
    run: TrainingRun,
    plan: TrainingSchedule,
    train: Callable[[int], Row],
    evaluate: Callable[[int], Row] | None = None,
) -> int:
    """Train from where the run stands to the end.

    Args:
        train: does a step, counted from 0, and tells its figures.
        evaluate: tells figures of the model after so many steps; also before the first.

    Returns:
        the number of the signal that ended it, or 0.
    """
    run.resume()
    run.note(steps=plan.steps)

    def evaluated() -> None:
        if evaluate is None:
            return
        try:
            row = evaluate(run.step)
        except EvaluationFailed:
            if run.step > run.saved:
                run.save()
            raise
        run.evaluated = True
        run.log({"step": run.step, **row})
        if run.writes:
            print(f"step {run.step}: {_told(row)}", flush=True)
        # An untrained judge may not agree enough for the figure to be defined.
        value = row.get(plan.best) if plan.best is not None else None
        if plan.best is not None and value is not None:
            run.keep_best(plan.best, value, plan.sound(row))
        run.ended = plan.stop_when(row) or ""

    shown = Progress("training", plan.steps, "steps") if run.writes else nullcontext()
    with shown as progress:
        try:
            due = run.step % plan.evaluate_every == 0 or run.step == plan.steps
            if due and not run.evaluated:
                evaluated()
                if run.step:
                    run.save()
            while run.step < plan.steps and not run.ended:
                run.check_signals()
                begin = time.perf_counter()
                row = train(run.step)
                run.step += 1
                run.evaluated = False
                seconds = time.perf_counter() - begin
                run.log({"step": run.step, **row, "seconds": seconds})
                if progress is not None:
                    progress.update(run.step, _told(row, most=4))
                last = run.step == plan.steps
                if run.step % plan.evaluate_every == 0 or last:
                    evaluated()
                if run.step % plan.save_every == 0 or last or run.ended:
                    run.save()
        except StoppedBySignal as stopped:
            if run.step > run.saved:
                run.save()
            if run.writes:
                print(
                    f"{stopped} after step {run.step}: the same command goes on from here",
                    flush=True,
                )
            return stopped.number
    if run.ended and run.writes:
        print(f"stopped after step {run.step}: {run.ended}", flush=True)
    return 0


def _told(row: Row, most: int = 12) -> str:
    numbers = [(n, v) for n, v in row.items() if isinstance(v, int | float)]
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers[:most])
