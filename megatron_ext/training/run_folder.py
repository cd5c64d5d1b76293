"""Folder of a run: protection of earlier runs, completion and record."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_ext.checkpoint import TRACKER, iterations
from megatron_ext.errors import UserError
from megatron_ext.training.run_progress import RunProgress


@dataclass
class Start:
    """State from which a run starts.

    Attributes:
        run_dir: Folder of `--run-dir`.
        progress: Progress of the checkpoint from which training resumes.
        finished: Reason why there is nothing to do, or an empty string.
        record: Function that writes `run.json`, to be called after the first step; None on all
            ranks but the first.
        lock: Lock of the run directory, which lasts as long as this object.
    """

    run_dir: Path | None
    progress: RunProgress
    finished: str = ""
    record: Callable[[], None] | None = None
    lock: IO[str] | None = None


def check_not_overwritten(args: Namespace) -> None:
    """Refuse to start a new run on top of an earlier one.

    Raises:
        UserError: The message names the folder of the earlier run.
    """
    if args.save is None or args.skip_train or args.load is None:
        return
    save = Path(args.save)
    from_elsewhere = Path(args.load).resolve() != save.resolve()
    if not args.finetune and not (from_elsewhere and args.run_dir is not None):
        return
    where = f"--run-dir {args.run_dir}" if args.run_dir is not None else f"--save {save}"
    if (save / TRACKER).is_file() or iterations(save):
        flag = "--finetune" if args.finetune else f"--load {args.load}"
        raise UserError(
            f"{flag} starts a new run, but {where} holds checkpoints of an earlier one. Give "
            f"another folder, or leave {flag.split()[0]} out to resume the earlier run."
        )
    if args.run_dir is None or not args.finetune:
        return
    rows = Path(args.run_dir, "metrics.jsonl")
    if (
        rows.is_file()
        and rows.stat().st_size
        and _commands(Path(args.run_dir))[-1:] != [_command()]
    ):
        raise UserError(
            f"--finetune starts a new run, but {rows} holds the metrics of an earlier one. Give "
            "another --run-dir."
        )


def why_finished(args: Namespace, progress: RunProgress) -> str:
    """Return a sentence on why a run is finished, or an empty string if it is not."""
    if not progress.finished(args) or not _is_evaluated(args, progress):
        return ""
    end = f"--train-iters {args.train_iters}"
    if not args.train_iters:
        end = f"--train-samples {args.train_samples}"
    return (
        f"{args.run_dir or args.load} is finished: it was trained for {progress.iteration:,} "
        f"steps, {progress.samples:,} samples, and {end} requires no more"
    )


def _is_evaluated(args: Namespace, progress: RunProgress) -> bool:
    """Return whether the evaluation after the last step, if any, is done."""
    if args.run_dir is None or not (args.eval_iters or args.full_validation):
        return True
    try:
        lines = Path(args.run_dir, "metrics.jsonl").read_text().splitlines()
    except OSError:
        return True
    return any(
        '"val_loss' in line and json.loads(line)["step"] >= progress.iteration
        for line in lines
        if line.endswith("}")
    )


def recorder(run_dir: Path, args: Namespace, facts: dict[str, Any]) -> Callable[[], None]:
    """Return a function that writes `run.json` with all commands and the last settings of a run.

    Args:
        run_dir: Folder of the run.
        args: Validated arguments of the run.
        facts: Further keys of the file, on the commit and the packages.
    """
    settings = {name: plain(value) for name, value in sorted(vars(args).items())}

    def record() -> None:
        path = run_dir / "run.json"
        contents = {
            "commands": [*_commands(run_dir), _command()],
            **facts,
            "world_size": args.world_size,
            "settings": settings,
        }
        temporary = path.with_name("run.json.tmp")
        temporary.write_text(json.dumps(contents, indent=1) + "\n")
        os.replace(temporary, path)

    return record


def _commands(run_dir: Path) -> list[str]:
    """Return the commands in the record of a run."""
    path = run_dir / "run.json"
    return json.loads(path.read_text())["commands"] if path.is_file() else []


def _command() -> str:
    """Return the command line of this process."""
    return " ".join(sys.argv)


def plain(value: Any) -> Any:
    """Return a setting as JSON data, converted to a string if it is of another type."""
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
