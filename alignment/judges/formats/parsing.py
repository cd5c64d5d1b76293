"""What a judge said, read strictly: exactly one label in exactly the place asked for.

Whatever else comes is unparseable, with the reason; no label is looked for in other text, as text
of the response that is judged may be repeated there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from alignment.records import Outcome, Side

OPEN, CLOSE = "<think>", "</think>"
# Raise it when any answer is read differently.
_VERSION = 1
_SPACE = " \t\r\n"  # what may surround a label; str.strip() would take more
_SCORE = re.compile(r"[0-9]")  # \d has the digits of other scripts
_NUMBERS = re.compile(r"[-+]?[0-9]+([.,/][0-9]+)?")


@dataclass(frozen=True)
class Parser:
    """Reads a judge's answers.

    Attributes:
        pairwise: labels are A, B and tie; else one digit, a score from 0 to 9.
        thinks: an answer is <think>, thinking, </think> and the label; else the label alone.
        opened: what was asked ended with <think> already, as some chat templates do.
    """

    pairwise: bool = False
    thinks: bool = False
    opened: bool = False

    @property
    def identity(self) -> str:
        """A hash of everything that its reading depends on."""
        settings = (_VERSION, self.pairwise, self.thinks, self.opened)
        return sha256(repr(settings).encode()).hexdigest()

    def read(self, text: str, swapped: bool = False) -> Mapping[str, Any]:
        """The fields of a verdict: outcome, thinking, and score, preferred or reason.

        Args:
            swapped: A was the pair's second response; the side preferred is in the pair's order.
        """
        thinking, label = "", text
        if self.thinks:
            try:
                thinking, label = self._part(text)
            except ValueError as error:
                return {"outcome": Outcome.UNPARSEABLE, "reason": str(error), "thinking": ""}
        fields = self._label(label.strip(_SPACE), swapped)
        return {"thinking": thinking, **fields}

    def _part(self, text: str) -> tuple[str, str]:
        """Thinking, and what follows it; raises a ValueError that gives the reason."""
        text = (OPEN if self.opened else "") + text.lstrip(_SPACE)
        if not text.startswith(OPEN):
            raise ValueError(f"the answer does not begin with {OPEN}")
        inside, closed, label = text.removeprefix(OPEN).partition(CLOSE)
        if not closed:
            raise ValueError("the thinking has no end")
        if OPEN in inside or OPEN in label or CLOSE in label:
            raise ValueError(f"{OPEN} or {CLOSE} is there more than once")
        return inside.strip(), label

    def _label(self, label: str, swapped: bool) -> Mapping[str, Any]:
        if self.pairwise and label in ("A", "B"):
            side = Side.SECOND if (label == "B") != swapped else Side.FIRST
            return {"outcome": Outcome.PREFERENCE, "preferred": side}
        if self.pairwise and label == "tie":
            return {"outcome": Outcome.TIE}
        if not self.pairwise and _SCORE.fullmatch(label):
            return {"outcome": Outcome.SCORE, "score": float(label)}
        return {"outcome": Outcome.UNPARSEABLE, "reason": self._reason(label)}

    def _reason(self, label: str) -> str:
        asked = "A, B or tie" if self.pairwise else "a digit from 0 to 9"
        place = "after the thinking" if self.thinks else "in the answer"
        if not label:
            return f"there is no label {place}"
        if not self.pairwise and _NUMBERS.fullmatch(label):
            return f"{label[:20]} is not a whole number from 0 to 9"
        several = r"(A|B|tie)" if self.pairwise else r"[0-9]"
        if re.fullmatch(rf"{several}([\s,;/]+{several})+", label):
            return f"several labels {place}"
        return f"more than {asked} {place}: {label[:40]!r}"
