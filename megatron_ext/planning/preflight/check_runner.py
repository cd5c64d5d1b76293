"""Checks one after the other, on all ranks alike, that cannot hang."""

import os
import threading
import time
from collections.abc import Callable

from megatron_ext.errors import UserError
from megatron_ext.planning.preflight.findings import FAILED, CheckResult, Report
from megatron_ext.training.launch import Launch

_LONG = 10  # times the patience with another rank: for a check as a whole


class Runner:
    """Runs checks. They run in the same order on every rank and end alike on them, so that no rank
    waits for one that has given up.

    Args:
        report: of this rank.
        patience: seconds to wait for another rank.

    Attributes:
        launch: the ranks; only this one until they have met.
    """

    def __init__(self, report: Report, patience: float) -> None:
        self.report, self.patience = report, patience
        self.launch = Launch(None, 0, 1, patience)
        self._checking, self._deadline = "", float("inf")
        self._ending = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def check(
        self, name: str, look: Callable[[], CheckResult], seconds: float | None = None
    ) -> bool:
        """Run one check on this rank, and hear how it went on the others.

        Args:
            name: of its row.
            look: returns what it found, of which rank 0's is told, or raises a `UserError`.
            seconds: after which it is given up; ten times the patience by default.

        Returns:
            whether it went well on all ranks.
        """
        self._seconds = seconds or _LONG * self.patience
        self._checking, self._deadline = name, time.monotonic() + self._seconds
        found, problem = CheckResult(""), None
        try:
            found = look()
        except UserError as error:
            problem = str(error)
        try:
            problem = problem and problem + self._silent_ranks(name)
            problem = self.launch.first_problem(f"check {name}", problem)
        except UserError as error:  # rank 0 is silent
            problem = problem or str(error)
        self._deadline = float("inf")
        self.report.add(name, found if problem is None else CheckResult(problem, FAILED))
        return problem is None

    def _silent_ranks(self, name: str) -> str:
        """On rank 0, who does not come out of a check in which others have failed."""
        launch = self.launch
        if launch.store is None or launch.rank != 0:
            return ""
        time.sleep(min(3.0, self.patience))
        others = range(1, launch.size)
        silent = [str(r) for r in others if not launch.store.check([f"check {name}/{r}"])]
        return f"; no answer from rank(s) {', '.join(silent[:8])}" if silent else ""

    def end(self) -> int:
        """The exit code, the same on all ranks, once rank 0 has told what there is to tell.

        Raises:
            UserError: rank 0 is silent.
        """
        self._ending.acquire()
        self.report.end()
        return self.launch.share("exit code", 2 if self.report.failed else 0)

    def _watch(self) -> None:
        """End it all where nothing times out by itself."""
        while time.monotonic() < self._deadline:
            time.sleep(0.2)
        if self._ending.acquire(blocking=False):
            what = (
                f"does not end within {self._seconds:g} s: a rank, a file system or the network "
                "hangs; look at the processes with py-spy dump, and set NCCL_DEBUG=INFO"
            )
            self.report.add(self._checking, CheckResult(what, FAILED))
            self.report.end()
            os._exit(2)
