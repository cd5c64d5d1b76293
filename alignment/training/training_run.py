"""Directory of a training run: metrics, checkpoints, the best model, and the settings of the run.

Rank 0 writes. After a kill at any time, the same command resumes from the newest complete
checkpoint and writes the metrics of later steps again.
"""

import json
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
from megatron_ext.console import console, log_name
from megatron_ext.errors import UserError
from megatron_ext.json_numbers import dump_json
from megatron_ext.processes import lock_folder
from megatron_ext.trackers import Trackers, TrackerSettings
from megatron_ext.training.checks import commit, versions
from megatron_ext.training.metrics import keep_rows
from megatron_ext.training.saving import write_atomically

# What a run writes before its first step or evaluation; answers of judges do not depend on the run.
_BEFORE_TRAINING = {
    "run.json", ".lock", "train.log", "trackers.json", "tensorboard", "wandb", "mlflow", "verdicts"
}  # fmt: skip
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StoppedBySignal(Exception):
    """Signal that arrived on some rank. All ranks raise this together."""

    def __init__(self, number: int) -> None:
        """Store the number of the signal. The message is its name."""
        super().__init__(signal.Signals(number).name)
        self.number = number


class TrainingRun:
    """Directory of a run, and the signals that stop it; a context manager.

    All ranks make the same calls.

    Attributes:
        step: Number of finished steps of the trainer, which is also the number of the next one.
        evaluated: Whether the evaluation after this step is done.
        saved: Step of the newest checkpoint. 0 before the first.
        ended: Reason for which the run ended before its last step, or an empty string.
    """

    def __init__(
        self,
        folder: Path,
        engine: AlignmentEngine,
        settings: Mapping[str, Any],
        others: Mapping[str, AlignmentEngine] | None = None,
        trackers: TrackerSettings | None = None,
    ) -> None:
        """Create the directory, or check that it belongs to the same run.

        Args:
            folder: The directory.
            engine: Engine of the model that is trained.
            settings: JSON values that must not change when a run resumes.
            others: Engines of other models that are trained together with this one, by name.
            trackers: Experiment trackers. Default: TensorBoard.

        Raises:
            UserError: The directory belongs to a run with other settings or is in use, or a tracker
                does not start.
        """
        self.folder, self.engine, self.step = folder, engine, 0
        self.others = dict(others or {})
        self.evaluated, self.saved, self.ended = False, 0, ""
        self._saved_model = 0  # step of the engine in the newest checkpoint
        self.writes = dist.get_rank() == 0
        self._signal = 0
        self._lock: Any = None
        self._trackers: Trackers | None = None
        self._before: dict[int, Any] = {}
        self._exits: list[Callable[[], None]] = []
        self._resumes: list[Callable[[int], None]] = []
        self.settings = json.loads(json.dumps(settings))
        if self.writes:
            self._open()
            chosen = trackers or TrackerSettings(
                run_dir=folder, tensorboard_dir=folder / "tensorboard"
            )
            self._trackers = Trackers(chosen, self.settings)
        dist.barrier()
        log = folder / log_name()
        console.log_to(log)
        if self.writes:
            console.line(f"{'Run':9}{folder}, all other output in {log}")

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._record_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        for call in self._exits:
            call()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._trackers is not None:
            self._trackers.close()
        if self._lock is not None:
            self._lock.close()

    def at_exit(self, call: Callable[[], None]) -> None:
        """Register a function without collectives that is called at every end of the run."""
        self._exits.append(call)

    def at_resume(self, call: Callable[[int], None]) -> None:
        """Register a function that is called with the number of finished steps after resuming."""
        self._resumes.append(call)

    def resume(self) -> bool:
        """Load the newest checkpoint, drop later metrics, and return whether there is one."""
        state, checkpoints = self._state, self.folder / "checkpoints"
        rows = json.loads(state.read_text()) if state.is_file() else []
        # Megatron and DeepSpeed name their newest checkpoint in a file.
        has_checkpoint = any((checkpoints / name).is_file() for name in (TRACKER, "latest"))
        if has_checkpoint:
            self.engine.load(checkpoints)
        # Several steps of the trainer have one step of the engine if they did not change the
        # weights.
        of_this_step = [row for row in rows if row["engine_step"] == self.engine.step]
        if of_this_step:
            newest = max(of_this_step, key=lambda row: row["step"])
            self.step, self.evaluated = newest["step"], newest["evaluated"]
            self.saved, self.ended = self.step, newest["ended"]
            self._saved_model = self.engine.step
            for name, engine in self.others.items():
                engine.load(self._place(name, self.step))
        elif has_checkpoint:
            raise UserError(
                f"{state} has no entry for engine step {self.engine.step}, of which there is a "
                "checkpoint. Restore the file, or start again in another --run-dir."
            )
        if self.writes:
            dropped = keep_rows(self.folder / "metrics.jsonl", self._remains)
            if self._trackers is not None:
                self._trackers.skip(dropped)
        dist.barrier()
        for call in self._resumes:
            call(self.step)
        return bool(of_this_step)

    def _remains(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of metrics remains when the run resumes.

        An evaluation of this step that was not saved is repeated. Rows of training have `seconds`.
        """
        if row["step"] == self.step and not self.evaluated:
            return "seconds" in row
        return bool(row["step"] <= self.step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics, which has a `step`."""
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(dump_json(row) + "\n")
        if self._trackers is not None:
            self._trackers.log(row["step"], row)

    def show_text(self, tag: str, text: str) -> None:
        """Send a text of the next step, in Markdown, to the trackers."""
        if self._trackers is not None:
            self._trackers.text(self.step + 1, tag, text)

    def finish_step(self, metrics: Mapping[str, Any]) -> None:
        """Count a step, and log its metrics under its number."""
        self.step += 1
        self.evaluated = False
        self.log({"step": self.step, **metrics})

    def save(self) -> None:
        """Write a checkpoint of this step. The previous one remains until it is complete.

        The other models come first, then the trainer's state, then the model itself: the newest
        complete checkpoint of the model decides which checkpoints of the others belong to it.
        """
        checkpoints = self.folder / "checkpoints"
        again = self.saved == self.step > 0  # only the state changes
        for name, engine in self.others.items():
            if again:
                break
            place = self._place(name, self.step)
            if self.writes:
                shutil.rmtree(place, ignore_errors=True)  # an incomplete folder of a killed run
            dist.barrier()
            engine.save(place)
        if self.writes:
            checkpoints.mkdir(parents=True, exist_ok=True)
            rows = json.loads(self._state.read_text()) if self._state.is_file() else []
            # Rows of unfinished saves must not displace those of checkpoints.
            rows = [row for row in rows if row["step"] <= self.saved and row["step"] < self.step]
            row = {"step": self.step, "evaluated": self.evaluated, "ended": self.ended}
            rows = [*rows[-3:], {**row, "engine_step": self.engine.step}]
            write_atomically(self._state, json.dumps(rows))
        # A skipped step does not change the model, and writing it again would first remove it.
        if self.engine.step != self._saved_model:
            self.engine.save(checkpoints)
        self.saved, self._saved_model = self.step, self.engine.step
        if self.writes:
            for name in self.others:
                for old in (checkpoints / name).iterdir():
                    if old != self._place(name, self.step):
                        shutil.rmtree(old)
            # Checkpoints of higher steps, which a killed run left, may be incomplete.
            for old in [*checkpoints.glob("iter_*"), *checkpoints.glob("step_*")]:
                if int(old.name[5:]) != self.engine.step:
                    shutil.rmtree(old)
        dist.barrier()

    def keep_best(self, name: str, value: float, sound: bool = True) -> bool:
        """Export the model to `best/` if its value is the highest so far, and return whether it is.

        A value that is higher only by rounding is not an improvement.

        Args:
            name: Name of the metric.
            value: Value of the metric, the same on all ranks.
            sound: Whether the value covers enough items. Such values rank above all others.
        """
        note = self.folder / "best" / "best.json"
        better_before = [None]
        if self.writes and note.is_file():
            before = json.loads(note.read_text())
            # An entry of this or a later step is from a killed run.
            better = sound > before["sound"] or (
                sound == before["sound"] and exceeds(value, before[name])
            )
            if before["step"] < self.step and not better:
                better_before = [before]
        dist.broadcast_object_list(better_before, src=0)
        if better_before[0] is not None:
            return False
        self.engine.export(self.folder / "best")
        if self.writes:
            write_atomically(
                note, json.dumps({"step": self.step, name: value, "sound": sound}) + "\n"
            )
        return True

    def check_signals(self) -> None:
        """Raise `StoppedBySignal` on all ranks if any of them has received a signal."""
        flag = torch.tensor(self._signal, device=_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if int(flag):
            raise StoppedBySignal(int(flag))

    @property
    def _state(self) -> Path:
        return self.folder / "checkpoints" / "trainer.json"

    def _place(self, name: str, step: int) -> Path:
        """Return the folder of a checkpoint of another model."""
        return self.folder / "checkpoints" / name / f"at_{step:06d}"

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C ends the process at once
        self._signal = number

    def _open(self) -> None:
        self._lock = lock_folder(self.folder)
        path = self.folder / "run.json"
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        has_begun = any(entry.name not in _BEFORE_TRAINING for entry in self.folder.iterdir())
        before = earlier.get("settings", self.settings) if has_begun else self.settings
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
                    f"--run-dir {self.folder} was started with other files in --{flag} "
                    f"{self.settings[flag]}. Restore them, or choose another --run-dir."
                )
            raise UserError(
                f"--run-dir {self.folder} was started with another --{flag} "
                f"({before.get(changed[0])!r}, now {self.settings.get(changed[0])!r}). Restore it, "
                "or choose another --run-dir."
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

    def note(self, **entries: Any) -> None:
        """Add entries to `run.json`."""
        if self.writes:
            path = self.folder / "run.json"
            record = json.loads(path.read_text()) | entries
            write_atomically(path, json.dumps(record, indent=1) + "\n")


def _device() -> Any:
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
