"""A judge that is a function in a Python file: for what a program can check."""

import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from alignment.judges.formats.scale import rescale
from alignment.records import Outcome, Pair, Response, Verdict
from megatron_ext.errors import TooFewResults, UserError

FUNCTION_TIMEOUT = 60.0  # seconds
_LOADING = 600.0  # seconds that a file may take to load, with its model say
_MOST_TIMEOUTS = 5  # in a row, after which no score is expected any more


class FunctionJudge:
    """Scores responses by a function, which takes a Response and returns a number or None.

    The function runs in a process of its own. It may be of any kind, and only a process can be
    ended in the middle of whatever it does.

    Attributes:
        identity: a hash of the file, the function's name and the scale.
    """

    _process: "subprocess.Popen[bytes] | None" = None

    def __init__(
        self,
        function: str,
        scale: Sequence[float] | None = None,
        timeout: float = FUNCTION_TIMEOUT,
    ) -> None:
        """Load the function.

        Args:
            function: FILE.py:NAME.
            scale: the lowest and the highest score that it gives; 0 and 9 by default.
            timeout: seconds that a call may take.

        Raises:
            UserError: it is not there, or its file cannot be run.
        """
        self.function, self.timeout = function, timeout
        self._scale = None if scale is None else (float(scale[0]), float(scale[1]))
        self._file, _, self._name = function.rpartition(":")
        try:
            source = Path(self._file).read_bytes()
        except OSError as error:
            raise self._not_loaded(f"{type(error).__name__}: {error}") from error
        scaled = "" if self._scale is None else repr(self._scale)
        self.identity = sha256(source + f"{self._name}{scaled}".encode()).hexdigest()
        self._timeouts = 0
        self._start()

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """Return what the function says.

        Its error, a score outside of the scale and a call beyond the time limit are failed calls,
        as those of an endpoint would be.

        Raises:
            UserError: the item is a pair, or the file cannot be loaded again.
            TooFewResults: several calls in a row were beyond the time limit.
        """
        if not isinstance(item, Response):
            raise UserError("a function scores responses, and these are pairs")
        outcome, score, reason = Outcome.FAILED, None, ""
        try:
            score = self._call(item)
        except (TimeoutError, RuntimeError) as error:
            reason = str(error)
        else:
            outcome, score, reason = self._read(score)
        return Verdict(item.id, outcome, score, sample=sample, reason=reason, judge=self.identity)

    def _read(self, score: float | None) -> tuple[Outcome, float | None, str]:
        """Return outcome, score and reason of a verdict."""
        if score is None:
            return Outcome.UNPARSEABLE, None, "the function gives no score"
        try:
            return Outcome.SCORE, rescale(score, self._scale), ""
        except ValueError as error:
            advice = "--scale LOW HIGH, or scale: [LOW, HIGH] in the judge's file"
            reason = f"{error}: name the scale of the function's scores ({advice})"
            return Outcome.FAILED, None, reason

    def close(self) -> None:
        """End the function's process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        own, other = Pipe()
        with other:
            worker = [sys.executable, "-m", "alignment.judges.kinds.function_worker"]
            self._process = subprocess.Popen(
                [*worker, str(other.fileno()), self._file, self._name],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
            )
        self._connection: Connection = own
        try:
            problem = self._receive(_LOADING)
        except (TimeoutError, RuntimeError) as error:
            problem = str(error)
        if problem:
            self.close()
            raise self._not_loaded(problem)

    def _not_loaded(self, problem: str) -> UserError:
        return UserError(
            f"the judge {self.function} cannot be loaded ({problem}): give FILE.py:NAME "
            "of a function"
        )

    def _call(self, item: Response) -> float | None:
        """Return the function's score.

        Raises:
            TimeoutError: it took longer than the time limit.
            RuntimeError: it raised an error, returned something else, or ended its process.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send(item)
            score, problem = self._receive(self.timeout)
        except TimeoutError:
            self.close()
            self._timeouts += 1
            if self._timeouts >= _MOST_TIMEOUTS:
                raise TooFewResults(
                    f"the judge {self.function} gave no score within {self.timeout:g} seconds "
                    f"{self._timeouts} times in a row: correct the function, or raise the time "
                    "limit (--timeout, or timeout in the judge's file)"
                ) from None
            raise
        except (RuntimeError, OSError) as error:
            self.close()
            raise RuntimeError(f"the function ended its process ({error})") from None
        self._timeouts = 0
        if problem:
            raise RuntimeError(problem)
        return score

    def _receive(self, timeout: float) -> Any:
        assert self._process is not None
        if not self._connection.poll(timeout):
            raise TimeoutError(f"no score within {timeout:g} seconds")
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"exit status {self._process.wait()}") from None
