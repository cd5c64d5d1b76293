"""Steps of a procedure: commands with a stamp of everything on which their results depend."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from megatron_ext.errors import UserError

_GRACE_S = 40.0  # seconds for a stopped training to save its checkpoint
_POLL_S = 0.1
_REAPED_S = 10.0  # seconds for killed descendants, which another process must reap


@dataclass(frozen=True)
class Step:
    """Command of a procedure.

    Attributes:
        name: Name in one word, also of the stamp.
        about: Description for the console.
        command: Arguments after the Python interpreter.
        makes: Files that exist when the step is finished.
        depends: Files that determine the result, including those of earlier steps.
        resumes: Files from which an interrupted run resumes; removed if the inputs have changed.
        output: File for the standard output of the command, instead of the log.
        environment: Environment variables to add.
        watch: Function that is called while the command runs, to report its progress.
    """

    name: str
    about: str
    command: Sequence[str]
    log: Path
    makes: Sequence[Path] = ()
    depends: Sequence[Path] = ()
    resumes: Sequence[Path] = ()
    output: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    watch: Callable[[], None] | None = None


def module(name: str, *arguments: str | Path) -> list[str]:
    """Return the arguments of Python that run a module."""
    return ["-m", name, *map(str, arguments)]


class Stopped(BaseException):
    """Signal that requests this process to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


_pending_signals: list[int] | None = None  # signals that arrived while they were deferred


def stop_on_signals() -> None:
    """Let SIGINT and SIGTERM raise `Stopped`, so that child processes are stopped."""

    def stop(number: int, _: FrameType | None) -> None:
        if _pending_signals is None:
            raise Stopped(number)
        _pending_signals.append(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer signals during a block, after which the first of them raises `Stopped`."""
    global _pending_signals
    came: list[int] = []
    _pending_signals = came
    try:
        yield
    finally:
        _pending_signals = None
    if came:
        raise Stopped(came[0])


def run_steps(
    steps: Sequence[Step], folder: Path, jobs: int = 1, keep_going: bool = False
) -> dict[str, str]:
    """Run the unfinished steps, in order.

    Args:
        steps: Steps of the procedure.
        folder: Folder of the stamps. A finished step with the same inputs is not run again.
        jobs: Number of concurrent steps; more than 1 requires independent steps.
        keep_going: Whether to run the other steps if one fails after it has made a file, such as a
            training that diverges. A step that fails before that has a mistake in its command.

    Returns:
        Names of the steps that failed, with the messages of their commands.

    Raises:
        UserError: A step failed, with the message of its command; concurrent steps are stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running: list[_Running] = []
    failures: dict[str, str] = {}

    def wait() -> None:
        time.sleep(_POLL_S)
        for one in [*running]:
            try:
                if not one.ended():
                    continue
            except UserError as error:
                if not keep_going or not any(path.exists() for path in one.step.makes):
                    raise
                say(f"{one.label} failed: {error}")
                failures[one.step.name] = str(error)
            running.remove(one)

    with ExitStack() as stack:
        for number, step in enumerate(steps, 1):
            while len(running) == jobs:
                wait()
            label = f"[{number}/{len(steps)}] {step.name}:"
            stamp, start_stamp = stamp_of(step), folder / f"{step.name}.begun"
            done = folder / f"{step.name}.done"
            if _holds(done, stamp) and all(path.exists() for path in step.makes):
                say(f"{label} done before, reused")
                continue
            done.unlink(missing_ok=True)
            resuming = _holds(start_stamp, stamp) and any(path.exists() for path in step.resumes)
            if not resuming:
                _remove(step.resumes)
            start_stamp.write_text(stamp)
            say(f"{label} {step.about}{', resuming' if resuming else ''} ...")
            one = stack.enter_context(_Running(step, label, done, stamp))
            one.start()
            running.append(one)
        while running:
            wait()
    return failures


def say(line: str) -> None:
    """Print a line on the console at once."""
    print(line, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as `5 s` or `4 min 08 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def stamp_of(step: Step) -> str:
    """Return a digest of everything on which the result of the step depends."""
    inputs = ["\0".join(step.command).encode(), *(path.read_bytes() for path in step.depends)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in inputs)).hexdigest()


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Running:
    """A step's process; leaving the context leaves no process behind."""

    def __init__(self, step: Step, label: str, done: Path, stamp: str) -> None:
        self.step, self.label, self.done, self.stamp = step, label, done, stamp
        self.began = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        output = step.output
        self.temporary = output and output.with_name(output.name + ".tmp")
        self.logged = step.log.stat().st_size if step.log.exists() else 0

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        step = self.step
        environment = {**os.environ, **step.environment, "PYTHONUNBUFFERED": "1"}
        with (
            step.log.open("a") as log,
            self.temporary.open("w") if self.temporary else nullcontext(log) as output,
            _deferred_signals(),  # a process that nobody knows of would be left behind
        ):
            # In a separate session, so that Ctrl-C reaches only this process, which stops it.
            self.process = subprocess.Popen(
                [sys.executable, *step.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            _stop(self.process)

    def ended(self) -> bool:
        """Return whether the step is done, and report its progress if not."""
        step = self.step
        assert self.process is not None
        if self.process.poll() is None:
            if step.watch:
                step.watch()
            return False
        if self.process.returncode:
            with step.log.open(errors="replace") as log:
                log.seek(self.logged)
                reason = failure(step.command, log.read())
            raise UserError(f"{reason} (step {step.name}; its log is {step.log}).")
        if self.temporary and step.output:
            self.temporary.replace(step.output)
        if missing := [str(path) for path in step.makes if not path.exists()]:
            raise UserError(f"{step.name} ended without making {missing[0]}. See {step.log}.")
        self.done.write_text(self.stamp)
        say(f"{self.label} done in {duration(time.monotonic() - self.began)}")
        return True


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process, and kill it and its descendants after a grace period."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        process.terminate()
        process.wait(_GRACE_S)
    except (subprocess.TimeoutExpired, Stopped):  # too slow, or stopped a second time
        pass
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.kill()
        process.wait()
        psutil.wait_procs(family, _REAPED_S)


def failure(command: Sequence[str], written: str) -> str:
    """Return why a command failed: its own sentence, the first exception, or its last line."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    script = next((word for word in command if word.endswith(".py")), "")
    tool = Path(script).name or command[1].rpartition(".")[2]
    if ("-m", "alignment") in pairwise(command):  # also on ranks that another module starts
        tool = "et-align"
    for pattern in (
        rf"{re.escape(tool)}: (?!warning: )",
        r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception): \S",
    ):
        if reason := next((line for line in lines if re.match(pattern, line)), None):
            return reason
    return lines[-1] if lines else f"{tool} failed without a message"
