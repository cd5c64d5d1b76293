"""What a training run keeps: metrics, checkpoints, its best model, and what it was started with.

Rank 0 writes. Killed at any moment, the same command goes on from the newest checkpoint that is
whole, and the rows of later steps are written again.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from alignment.engines.protocol import AlignmentEngine
from alignment.rounding import exceeds
from megatron_ext.checkpoint import TRACKER
from megatron_ext.errors import UserError
from megatron_ext.processes import lock_folder
from megatron_ext.training.checks import commit, versions
from megatron_ext.training.metrics import keep_rows
from megatron_ext.training.saving import write_atomically

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StoppedBySignal(Exception):
    """A signal came, on some rank; all ranks raise this together."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class TrainingRun:
    """A run's directory and the signals that end it. Use as a context; ranks make the same calls.

    Attributes:
        step: of the trainer, from 0; the next to be done.
        evaluated: whether this step's evaluation is done.
        saved: the step of the newest checkpoint; 0 before the first.
        ended: why it was ended before its last step, if it was.
    """

    def __init__(
        self,
        folder: Path,
        engine: AlignmentEngine,
        settings: Mapping[str, Any],
        beside: Mapping[str, AlignmentEngine] | None = None,
    ) -> None:
        """Make the directory, or see that it belongs to the same run.

        Args:
            settings: plain data that must not change when a run goes on.
            beside: by name, other models that are trained with this one.

        Raises:
            UserError: the directory belongs to a run with other settings, or is in use.
        """
        self.folder, self.engine, self.step = folder, engine, 0
        self.beside = dict(beside or {})
        self.evaluated, self.saved, self.ended = False, 0, ""
        self._saved_model = 0  # the engine's step of the newest checkpoint
        self.writes = dist.get_rank() == 0
        self._signal = 0
        self._lock: Any = None
        self._board: Any = None
        self._before: dict[int, Any] = {}
        self._exits: list[Callable[[], None]] = []
        self._resumes: list[Callable[[int], None]] = []
        self.settings = json.loads(json.dumps(settings))
        if self.writes:
            self._open()
        dist.barrier()

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        for call in self._exits:
            call()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call a function without collectives when the run ends, however it does."""
        self._exits.append(call)

    def at_resume(self, call: Callable[[int], None]) -> None:
        """Call a function with the number of finished steps when the run has been resumed."""
        self._resumes.append(call)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one; drop the rows that come after it."""
        state, checkpoints = self._state, self.folder / "checkpoints"
        rows = json.loads(state.read_text()) if state.is_file() else []
        # Megatron and DeepSpeed name their newest in a file; before it the weights are --model's.
        found = any((checkpoints / name).is_file() for name in (TRACKER, "latest"))
        if found:
            self.engine.load(checkpoints)
        # Several steps of the trainer may share one of the engine, whose weights they left.
        known = [row for row in rows if row["engine_step"] == self.engine.step]
        if known:
            newest = max(known, key=lambda row: row["step"])
            self.step, self.evaluated = newest["step"], newest["evaluated"]
            self.saved, self.ended = self.step, newest["ended"]
            self._saved_model = self.engine.step
            for name, engine in self.beside.items():
                engine.load(self._place(name, self.step))
        elif found:
            raise UserError(f"{state} tells nothing of engine step {self.engine.step}")
        if self.writes:
            keep_rows(self.folder / "metrics.jsonl", self._stands)
        dist.barrier()
        for call in self._resumes:
            call(self.step)
        return bool(known)

    def _stands(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of metrics is of what has been done. An evaluation of this step that was
        not saved comes again; the row of its training tells the seconds."""
        if row["step"] == self.step and not self.evaluated:
            return "seconds" in row
        return bool(row["step"] <= self.step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics; it has a `step`."""
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer().add_scalar(name, value, row["step"])

    def finish_step(self, metrics: Mapping[str, Any]) -> None:
        """Count a step, and log its metrics under its number."""
        self.step += 1
        self.evaluated = False
        self.log({"step": self.step, **metrics})

    def save(self) -> None:
        """Write a checkpoint of this step; the one before stays until it is whole.

        What is beside comes first, then what tells of the step, then the model itself: it is the
        newest whole checkpoint of the model that says which of the others goes with it.
        """
        checkpoints = self.folder / "checkpoints"
        again = self.saved == self.step > 0  # the weights are there; what is told of them changes
        for name, engine in self.beside.items():
            if again:
                break
            place = self._place(name, self.step)
            if self.writes:
                shutil.rmtree(place, ignore_errors=True)  # half of one, of a run that was killed
            dist.barrier()
            engine.save(place)
        if self.writes:
            checkpoints.mkdir(parents=True, exist_ok=True)
            rows = json.loads(self._state.read_text()) if self._state.is_file() else []
            # Others are of saves that were not finished, and must not push out what is there.
            rows = [row for row in rows if row["step"] <= self.saved and row["step"] < self.step]
            row = {"step": self.step, "evaluated": self.evaluated, "ended": self.ended}
            rows = [*rows[-3:], {**row, "engine_step": self.engine.step}]
            write_atomically(self._state, json.dumps(rows))
        # Of a step that was skipped the model is there; to write it again would first remove it.
        if self.engine.step != self._saved_model:
            self.engine.save(checkpoints)
        self.saved, self._saved_model = self.step, self.engine.step
        if self.writes:
            for name in self.beside:
                for old in (checkpoints / name).iterdir():
                    if old != self._place(name, self.step):
                        shutil.rmtree(old)
            # Also those of higher steps, which a killed run left: half of them may be missing.
            for old in [*checkpoints.glob("iter_*"), *checkpoints.glob("step_*")]:
                if int(old.name[5:]) != self.engine.step:
                    shutil.rmtree(old)
        dist.barrier()

    def keep_best(self, name: str, value: float, sound: bool = True) -> bool:
        """Export the model to `best/` if `value` is the highest so far; ranks pass the same.

        A value that is higher by no more than rounding is no improvement: the earlier model stays.

        Args:
            sound: whether the value stands for enough items; one that does not is below all that
                do.
        """
        note = self.folder / "best" / "best.json"
        found = [None]
        if self.writes and note.is_file():
            before = json.loads(note.read_text())
            # A step that comes again was left by a run that was killed after it.
            better = sound > before["sound"] or (
                sound == before["sound"] and exceeds(value, before[name])
            )
            if before["step"] < self.step and not better:
                found = [before]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            return False
        self.engine.export(self.folder / "best")
        if self.writes:
            write_atomically(
                note, json.dumps({"step": self.step, name: value, "sound": sound}) + "\n"
            )
        return True

    def check_signals(self) -> None:
        """Raise `Stopped` on all ranks if a signal has come on any."""
        flag = torch.tensor(self._signal, device=_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if int(flag):
            raise StoppedBySignal(int(flag))

    @property
    def _state(self) -> Path:
        return self.folder / "checkpoints" / "trainer.json"

    def _place(self, name: str, step: int) -> Path:
        """Of a checkpoint of what is trained beside the model."""
        return self.folder / "checkpoints" / name / f"at_{step:06d}"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt  # the second time it is meant
        self._signal = number

    def _open(self) -> None:
        self._lock = lock_folder(self.folder)
        path = self.folder / "run.json"
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        before = earlier.get("settings", self.settings)
        changed = sorted(
            name
            for name in before  # an earlier version recorded fewer settings
            if before[name] != self.settings.get(name)
        )
        if changed:
            flag = changed[0].replace("_", "-")
            if flag.endswith("-content"):
                flag = flag.removesuffix("-content")
                raise UserError(
                    f"--run-dir {self.folder} was begun with other files in --{flag} "
                    f"{self.settings[flag]}: bring them back, or give "
                    "another --run-dir"
                )
            raise UserError(
                f"--run-dir {self.folder} was begun with another --{flag} "
                f"({before.get(changed[0])!r}, now {self.settings.get(changed[0])!r}): give it "
                "back, or another --run-dir"
            )
        record = {
            **earlier,
            "commands": [*earlier.get("commands", []), " ".join(sys.argv)],
            "commit": commit(),
            "versions": versions(),
            "world_size": dist.get_world_size(),
            "settings": self.settings,
        }
        write_atomically(path, json.dumps(record, indent=1) + "\n")

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        if self.writes:
            path = self.folder / "run.json"
            record = json.loads(path.read_text()) | facts
            write_atomically(path, json.dumps(record, indent=1) + "\n")

    def _writer(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                os.fspath(self.folder / "tensorboard"), purge_step=self.step
            )
        return self._board


def _device() -> Any:
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
