"""Detection of a stalled run, which ends it and names the rank that blocks it.

A hanging collective ends in a timeout that names the ranks that waited, not the missing one. Here
each rank watches itself. The first rank without progress for too long notifies all others through
the store of the launch. Each answers with its position in the program; a rank that is in no
collective, or does not answer, blocks the run.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from types import FrameType
from typing import Any

from megatron_ext.console import console
from megatron_ext.training.launch import Launch

# Files in which a rank waits for others.
_WAITING = ("torch/distributed/", "torch/cuda/", "megatron_ext/devices/gloo.py")
_LIBRARIES = ("site-packages/", "lib/python", "megatron_ext/devices/")


class Watchdog:
    """Observer of the steps of this rank, and the context in which it observes them.

    Args:
        launch: Ranks of the run.
        timeout: Seconds without progress after which the run is ended.
        step: Function that returns the number of the current step.
    """

    def __init__(self, launch: Launch, timeout: float, step: Callable[[], int]) -> None:
        self.launch, self.timeout, self.step = launch, timeout, step
        self._last: float | None = None  # time of the last progress
        self._main = threading.main_thread().ident
        # A store serves one thread at a time, and the main thread may wait in it.
        self._store = None if launch.store is None else launch.store.clone()  # type: ignore[attr-defined]
        self._pause = min(5.0, timeout / 10)
        self._closed = threading.Event()
        targets = [self._watch] if self._store is None else [self._watch, self._listen]
        self._threads = [threading.Thread(target=t, name="watchdog", daemon=True) for t in targets]

    def __enter__(self) -> "Watchdog":
        """Start to observe."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads.

        A thread that returned from the store during Python's shutdown would abort the process.
        The wait is bounded, because a store on an unreachable node does not answer.
        """
        self._closed.set()
        for thread in self._threads:
            thread.join(1 + self._pause)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is watched while it runs."""

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._last = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self._last = None

        return watched

    def progress(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count as progress of this rank."""

        @wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._last is not None:
                self._last = time.monotonic()
            return function(*args, **kwargs)

        return recorded

    def _stalled_for(self) -> float:
        """Return the seconds beyond the timeout since the last progress, negative before it."""
        last = self._last
        return -1.0 if last is None else time.monotonic() - last - self.timeout

    def _watch(self) -> None:
        """End this rank without the store, which hangs if its node is unreachable."""
        patience = 0.0 if self._store is None else 10 * self._pause
        while self._stalled_for() <= patience:
            if self._closed.wait(self._pause):
                return
        silent = "" if self._store is None else ", and the launch's store does not answer"
        self._print(f"rank {self.launch.rank} is in {self._place()[0]}{silent}")
        os._exit(1)

    def _listen(self) -> None:
        """Notify the other ranks when this one has stalled, and answer their notification."""
        assert self._store is not None
        with suppress(RuntimeError):  # if the store fails, the other thread reports
            while self._stalled_for() < 0 and not self._store.check(["stall"]):
                if self._closed.wait(self._pause):
                    return
            self._answer()
            os._exit(1)

    def _answer(self) -> None:
        """Report the position of this rank; one rank then prints the reports of all."""
        assert self._store is not None
        place, waits = self._place()
        answer = {"place": place, "waits": waits, "node": platform.node()}
        self._store.set(f"stall/{self.launch.rank}", json.dumps(answer))
        self._store.set("stall", "")
        if self._store.add("stall/reporter", 1) == 1:
            time.sleep(3 * self._pause)
            self._print_reports()
            self._store.set("stall/reported", "")
        else:
            deadline = time.monotonic() + 6 * self._pause
            while time.monotonic() < deadline and not self._store.check(["stall/reported"]):
                time.sleep(0.1)

    def _print_reports(self) -> None:
        """Print the positions of the ranks, those that block the run first."""
        assert self._store is not None
        blocking: list[str] = []
        waiting: list[str] = []
        for rank in range(self.launch.size):
            if not self._store.check([f"stall/{rank}"]):
                blocking.append(
                    f"rank {rank} does not answer: it is stopped, or its node is unreachable"
                )
                continue
            answer = json.loads(self._store.get(f"stall/{rank}"))
            place = f"rank {rank} on {answer['node']} is in {answer['place']}"
            (waiting if answer["waits"] else blocking).append(place)
        if not blocking:
            self._print("every rank waits in a collective; " + "; ".join(waiting[:8]))
        else:
            others = f"; {len(waiting)} others wait, {waiting[0]}" if waiting else ""
            self._print("; ".join(blocking[:8]) + others)

    def _print(self, message: str) -> None:
        """Print a message on standard error, after the name of the program and the step."""
        name = os.path.basename(sys.argv[0])
        console.error(
            f"{name}: no progress for {self.timeout:g} s in step {self.step()}: {message}"
        )

    def _place(self) -> tuple[str, bool]:
        """Return the position of the main thread outside of libraries, and whether it waits."""
        frame: FrameType | None = sys._current_frames()[self._main or 0]
        waits, depth = False, 0
        while frame is not None:
            file = frame.f_code.co_filename
            waits |= depth < 4 and any(part in file for part in _WAITING)
            if not any(part in file for part in _LIBRARIES):
                return f"{os.path.relpath(file)}:{frame.f_lineno} ({frame.f_code.co_name})", waits
            frame, depth = frame.f_back, depth + 1
        return "no function of this project", waits
