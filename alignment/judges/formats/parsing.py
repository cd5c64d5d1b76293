"""Parser of a judge's answer, which must contain exactly one label at exactly one position.

Everything else is unparseable, with the reason. No label is searched for in other text, where the
judge may repeat text of the response.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from alignment.records import Outcome, Side

OPEN, CLOSE = "<think>", "</think>"
# Increase this when any answer is parsed differently.
_VERSION = 1
_SPACE = " \t\r\n"  # characters that may surround a label; str.strip() would remove more
_SCORE = re.compile(r"[0-9]")  # \d would match digits of other scripts
_NUMBERS = re.compile(r"[-+]?[0-9]+([.,/][0-9]+)?")


@dataclass(frozen=True)
class Parser:
    """Parser of the answers of a judge.

    Attributes:
        pairwise: Whether the labels are A, B and tie; otherwise a label is a digit from 0 to 9.
        thinks: Whether an answer is <think>, thinking, </think> and the label; otherwise it is the
            label alone.
        opened: Whether the prompt has ended with <think> already, as some chat templates do.
    """

    pairwise: bool = False
    thinks: bool = False
    opened: bool = False

    @property
    def identity(self) -> str:
        """Return a hash of everything on which the parsing depends."""
        settings = (_VERSION, self.pairwise, self.thinks, self.opened)
        return sha256(repr(settings).encode()).hexdigest()

    def read(self, text: str, swapped: bool = False) -> Mapping[str, Any]:
        """Return the fields of a verdict: outcome, thinking, and score, preferred or reason.

        Args:
            text: The answer.
            swapped: Whether A was the second response of the pair; the preferred side is returned
                in the order of the pair.
        """
        thinking, label = "", text
        if self.thinks:
            try:
                thinking, label = self._split(text)
            except ValueError as error:
                return {"outcome": Outcome.UNPARSEABLE, "reason": str(error), "thinking": ""}
        fields = self._label(label.strip(_SPACE), swapped)
        return {"thinking": thinking, **fields}

    def _split(self, text: str) -> tuple[str, str]:
        """Return the thinking and what follows it, or raise a ValueError with the reason."""
        text = (OPEN if self.opened else "") + text.lstrip(_SPACE)
        if not text.startswith(OPEN):
            raise ValueError(f"the answer does not begin with {OPEN}")
        inside, closed, label = text.removeprefix(OPEN).partition(CLOSE)
        if not closed:
            raise ValueError("the thinking does not end")
        if OPEN in inside or OPEN in label or CLOSE in label:
            raise ValueError(f"{OPEN} or {CLOSE} occurs more than once")
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
        label_form = "A, B or tie" if self.pairwise else "a digit from 0 to 9"
        place = "after the thinking" if self.thinks else "in the answer"
        if not label:
            return f"there is no label {place}"
        if not self.pairwise and _NUMBERS.fullmatch(label):
            return f"{label[:20]} is not a whole number from 0 to 9"
        several = r"(A|B|tie)" if self.pairwise else r"[0-9]"
        if re.fullmatch(rf"{several}([\s,;/]+{several})+", label):
            return f"several labels {place}"
        return f"more than {label_form} {place}: {label[:40]!r}"
