"""A judge that is a function in a Python file: for what a program can check."""

import math
import runpy
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.records import Outcome, Pair, Response, Verdict
from megatron_ext.errors import UserError


class FunctionJudge:
    """Scores responses by a function, which takes a Response and gives a number or None.

    Attributes:
        identity: a hash of the file and the function's name.
    """

    def __init__(self, function: str) -> None:
        """See the class.

        Args:
            function: FILE.py:NAME.

        Raises:
            UserError: it is not there, or its file cannot be run.
        """
        file, _, name = function.rpartition(":")
        try:
            source = Path(file).read_bytes()
            self._score = runpy.run_path(file)[name]
            if not callable(self._score):
                raise TypeError(f"{name} is {self._score!r:.40}")
        except (Exception, SystemExit) as error:  # the file is the user's, and may do anything
            raise UserError(
                f"the judge {function} cannot be loaded ({type(error).__name__}: {error}): give "
                "FILE.py:NAME of a function"
            ) from error
        self.identity = sha256(source + name.encode()).hexdigest()

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """What the function says; its error is a failed call, as that of an address would be."""
        if not isinstance(item, Response):
            raise UserError("a function scores responses, and these are pairs")
        outcome, score, reason = Outcome.SCORE, None, ""
        try:
            if (said := self._score(item)) is None:
                outcome, reason = Outcome.UNPARSEABLE, "the function gives no score"
            else:
                score = _number(said)
        except Exception as error:
            outcome, reason = Outcome.FAILED, f"{type(error).__name__}: {error}"
        return Verdict(item.id, outcome, score, sample=sample, reason=reason, judge=self.identity)


def _number(said: Any) -> float:
    """A score; raises a ValueError or TypeError where there is none."""
    score = float(said)
    if isinstance(said, str) or not math.isfinite(score):
        raise ValueError(f"the function gives {said!r}, which is no number")
    return score
