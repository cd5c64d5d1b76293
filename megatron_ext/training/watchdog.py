"""Detection of a stalled run: it is ended, and the rank that blocks it is named.

A hanging collective ends in a timeout that names the ranks that waited, not the missing one. Here
each rank watches itself. The first without progress for too long calls all others through the
launch's store. Each answers with its position in the program; a rank that stands in no collective,
or does not answer, blocks the run.
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

from megatron_ext.training.launch import Launch

# Where a rank stands that waits for others.
_WAITING = ("torch/distributed/", "torch/cuda/", "megatron_ext/devices/gloo.py")
_LIBRARIES = ("site-packages/", "lib/python", "megatron_ext/devices/")


class Watchdog:
    """Observer of the steps of this rank.

    Args:
        launch: the ranks of the run.
        timeout: seconds without progress after which the run is ended.
        step: Returns the number of the current step.
    """

    def __init__(self, launch: Launch, timeout: float, step: Callable[[], int]) -> None:
        self.launch, self.timeout, self.step = launch, timeout, step
        self._last: float | None = None  # None outside of steps, where nothing is watched
        self._main = threading.main_thread().ident
        # A store serves one thread at a time, and the main thread may wait in it.
        self._store = None if launch.store is None else launch.store.clone()  # type: ignore[attr-defined]
        self._pause = min(5.0, timeout / 10)
        for target in (self._watch, *([self._listen] if self._store is not None else [])):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

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
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._last is not None:
                self._last = time.monotonic()
            return function(*args, **kwargs)

        return noted

    def _stalled_for(self) -> float:
        """Return the seconds beyond the timeout since the last progress, negative before it."""
        last = self._last
        return -1.0 if last is None else time.monotonic() - last - self.timeout

    def _watch(self) -> None:
        """End this rank by the clock alone: the store may hang too, its node being cut off."""
        patience = 0.0 if self._store is None else 10 * self._pause
        while self._stalled_for() <= patience:
            time.sleep(self._pause)
        silent = "" if self._store is None else ", and the launch's store does not answer"
        self._say(f"rank {self.launch.rank} stands in {self._place()[0]}{silent}")
        os._exit(1)

    def _listen(self) -> None:
        """Call the other ranks when this one has stalled, and answer their call."""
        assert self._store is not None
        with suppress(RuntimeError):  # without a store the other thread reports
            while self._stalled_for() < 0 and not self._store.check(["stall"]):
                time.sleep(self._pause)
            self._answer()
            os._exit(1)

    def _answer(self) -> None:
        """Report where this rank stands; one rank then prints the reports of all."""
        assert self._store is not None
        place, waits = self._place()
        answer = {"place": place, "waits": waits, "node": platform.node()}
        self._store.set(f"stall/{self.launch.rank}", json.dumps(answer))
        self._store.set("stall", "")
        if self._store.add("stall/teller", 1) == 1:
            time.sleep(3 * self._pause)
            self._tell()
            self._store.set("stall/reported", "")
        else:
            deadline = time.monotonic() + 6 * self._pause
            while time.monotonic() < deadline and not self._store.check(["stall/reported"]):
                time.sleep(0.1)

    def _tell(self) -> None:
        assert self._store is not None
        holding: list[str] = []
        waiting: list[str] = []
        for rank in range(self.launch.size):
            if not self._store.check([f"stall/{rank}"]):
                holding.append(f"rank {rank} does not answer: it is stopped, or its node cut off")
                continue
            answer = json.loads(self._store.get(f"stall/{rank}"))
            place = f"rank {rank} on {answer['node']} stands in {answer['place']}"
            (waiting if answer["waits"] else holding).append(place)
        if not holding:
            self._say("every rank waits in a collective; " + "; ".join(waiting[:8]))
        else:
            rest = f"; {len(waiting)} others wait, {waiting[0]}" if waiting else ""
            self._say("; ".join(holding[:8]) + rest)

    def _say(self, what: str) -> None:
        name = os.path.basename(sys.argv[0])
        print(
            f"{name}: no progress for {self.timeout:g} s in step {self.step()}: {what}",
            file=sys.stderr,
            flush=True,
        )

    def _place(self) -> tuple[str, bool]:
        """Where the main thread stands outside of libraries, and whether it waits for others."""
        frame: FrameType | None = sys._current_frames()[self._main or 0]
        waits, depth = False, 0
        while frame is not None:
            file = frame.f_code.co_filename
            waits |= depth < 4 and any(part in file for part in _WAITING)
            if not any(part in file for part in _LIBRARIES):
                return f"{os.path.relpath(file)}:{frame.f_lineno} ({frame.f_code.co_name})", waits
            frame, depth = frame.f_back, depth + 1
        return "no function of this project", waits
