"""Runner of checks that all ranks run in the same order and that cannot hang."""

import os
import threading
import time
from collections.abc import Callable

from megatron_ext.errors import UserError
from megatron_ext.planning.preflight.findings import FAILED, CheckResult, Report
from megatron_ext.training.launch import Launch

_LONG = 10  # time limit of a check, in multiples of the time limit for an answer of another rank


class Runner:
    """Runner of checks.

    Checks run in the same order on every rank and have the same outcome on all, so that no rank
    waits for one that has stopped.

    Args:
        report: Report of this rank.
        patience: Seconds to wait for another rank.

    Attributes:
        launch: Ranks that take part; this rank alone until they have connected.
    """

    def __init__(self, report: Report, patience: float) -> None:
        self.report, self.patience = report, patience
        self.launch = Launch(None, 0, 1, patience)
        self._checking, self._deadline = "", float("inf")
        self._ending = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def check(
        self, name: str, run: Callable[[], CheckResult], seconds: float | None = None
    ) -> bool:
        """Run one check on this rank, and exchange its outcome with the other ranks.

        Args:
            name: Name of its row in the report.
            run: Function that returns the result, of which the report has that of rank 0, or
                raises a `UserError`.
            seconds: Time limit. Default: ten times the patience.

        Returns:
            Whether the check passed on all ranks.
        """
        self._seconds = seconds or _LONG * self.patience
        self._checking, self._deadline = name, time.monotonic() + self._seconds
        result, problem = CheckResult(""), None
        try:
            result = run()
        except UserError as error:
            problem = str(error)
        try:
            problem = problem and problem + self._silent_ranks(name)
            problem = self.launch.first_problem(f"check {name}", problem)
        except UserError as error:  # rank 0 does not answer
            problem = problem or str(error)
        self._deadline = float("inf")
        self.report.add(name, result if problem is None else CheckResult(problem, FAILED))
        return problem is None

    def _silent_ranks(self, name: str) -> str:
        """Return a phrase, on rank 0 alone, on ranks that have not ended a failed check."""
        launch = self.launch
        if launch.store is None or launch.rank != 0:
            return ""
        time.sleep(min(3.0, self.patience))
        others = range(1, launch.size)
        silent = [str(r) for r in others if not launch.store.check([f"check {name}/{r}"])]
        return f"; no answer from rank(s) {', '.join(silent[:8])}" if silent else ""

    def end(self) -> int:
        """Write the report and return the exit code, which is the same on all ranks.

        Raises:
            UserError: Rank 0 does not answer.
        """
        self._ending.acquire()
        self.report.end()
        return self.launch.share("exit code", 2 if self.report.failed else 0)

    def _watch(self) -> None:
        """End the process when a check exceeds its time limit."""
        while time.monotonic() < self._deadline:
            time.sleep(0.2)
        if self._ending.acquire(blocking=False):
            message = (
                f"does not end within {self._seconds:g} s: a rank, a file system or the network "
                "hangs; look at the processes with py-spy dump, and set NCCL_DEBUG=INFO"
            )
            self.report.add(self._checking, CheckResult(message, FAILED))
            self.report.end()
            os._exit(2)
