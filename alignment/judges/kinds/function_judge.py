"""Judge that is a function in a Python file, for properties that a program can check."""

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
_LOADING = 600.0  # seconds that a file may take to load, for example with a model
_MOST_TIMEOUTS = 5  # in a row, after which the command ends


class FunctionJudge:
    """Function that takes a `Response` and returns a score or None.

    The function runs in a separate process, because only a process can be interrupted at any point.

    Attributes:
        function: FILE.py:NAME of the function.
        timeout: Time limit of a call, in seconds.
        identity: A hash of the file, the name of the function and the scale.
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
            function: FILE.py:NAME of the function.
            scale: The lowest and the highest score of the function. Default: 0 and 9.
            timeout: Time limit of a call, in seconds.

        Raises:
            UserError: If there is no such function, or its file cannot be run.
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
        """Return the verdict of the function.

        An error of the function, a score outside of the scale and a call beyond the time limit are
        failed calls, as those of an endpoint are.

        Args:
            item: The response.
            swapped: Not used, because a function scores responses.
            sample: Number of this answer among several to the same question.

        Raises:
            UserError: If the item is a pair, or the file cannot be loaded again.
            TooFewResults: If several calls in a row exceeded the time limit.
        """
        if not isinstance(item, Response):
            raise UserError(
                f"The function {self.function} scores responses, and these are pairs. Pass a file "
                "of responses, or choose another judge."
            )
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
            return Outcome.UNPARSEABLE, None, "the function returned no score"
        try:
            return Outcome.SCORE, rescale(score, self._scale), ""
        except ValueError as error:
            advice = "--scale LOW HIGH, or scale: [LOW, HIGH] in the judge's file"
            reason = f"{error}. State the scale of the function's scores ({advice})"
            return Outcome.FAILED, None, reason

    def close(self) -> None:
        """End the process of the function."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        parent_end, child_end = Pipe()
        with child_end:
            worker = [sys.executable, "-m", "alignment.judges.kinds.function_worker"]
            self._process = subprocess.Popen(
                [*worker, str(child_end.fileno()), self._file, self._name],
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
            )
        self._connection: Connection = parent_end
        try:
            problem = self._receive(_LOADING)
        except (TimeoutError, RuntimeError) as error:
            problem = str(error)
        if problem:
            self.close()
            raise self._not_loaded(problem)

    def _not_loaded(self, problem: str) -> UserError:
        return UserError(
            f"The judge {self.function} cannot be loaded ({problem}). Name a function as "
            "FILE.py:NAME."
        )

    def _call(self, item: Response) -> float | None:
        """Return the score of the function.

        Raises:
            TimeoutError: If the call exceeded the time limit.
            RuntimeError: If the function raised an error, returned no number or ended its process.
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
                    f"The judge {self.function} returned no score within {self.timeout:g} seconds "
                    f"{self._timeouts} times in a row. Correct the function, or raise the time "
                    "limit (--timeout, or timeout in the judge's file)."
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
