"""Commands of `et-align` as steps of a procedure."""

from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.steps import Step, module
from examples.quickstart.training import TrainingProgress, device


def align(*words: object) -> list[str]:
    """`et-align WORDS`."""
    return module("alignment", *map(str, words))


def step(
    name: str,
    about: str,
    command: Sequence[str],
    log: Path,
    makes: Sequence[Path],
    depends: Sequence[Path],
    *,
    threads: int = 1,
    on_gpus: bool = False,
    output: Path | None = None,
) -> Step:
    """Return the step of a command that is not interrupted.

    Args:
        threads: Number of threads of a process.
        output: See `Step`, also for the other arguments.
    """
    return Step(
        name, about, command, log, makes, depends,
        output=output, environment=_environment(threads, on_gpus),
    )  # fmt: skip


def training(
    name: str,
    about: str,
    command: Sequence[str],
    run: Path,
    makes: str,
    depends: Sequence[Path],
    *,
    ranks: int = 1,
    threads: int = 1,
    on_gpus: bool = False,
    metric: str = "loss",
) -> Step:
    """Return the step of a command that trains in the folder of a run and resumes there.

    Args:
        command: Command without `--run-dir`.
        makes: File in the folder that a finished training has written.
        metric: Metric to report during training.
    """
    run.mkdir(parents=True, exist_ok=True)
    command = [*command, "--run-dir", str(run)]
    if ranks > 1:
        launch = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks))
        command = [*module("torch.distributed.run", *launch), *command]
    folders = (
        "alarms", "best", "checkpoints", "final", "responses", "rollouts", "served", "tensorboard",
        "validation", "verdicts",
    )  # fmt: skip
    files = ("first.json", "metrics.jsonl", "run.json", "samples.jsonl")
    return Step(
        name, about, command, run / "console.log", [run / makes], depends,
        [run / part for part in (*folders, *files)],
        environment=_environment(threads, on_gpus),
        watch=TrainingProgress(run / "metrics.jsonl", None, name, metric=metric),
    )  # fmt: skip


def _environment(threads: int, on_gpus: bool) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **device(on_gpus)}
