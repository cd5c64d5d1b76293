"""How two responses differ in style: what judges are known to be swayed by."""

import re
from collections.abc import Sequence

import numpy as np

from alignment.records import Pair
from alignment.rounding import EXACT, Floats

COLUMNS = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MARKS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
_WORD = re.compile(r"\w+|[^\w\s]")


def counts(text: str) -> list[int]:
    """Words and punctuation marks; headers, list items and bold spans outside of code blocks."""
    plain = _CODE.sub("", text)
    return [len(_WORD.findall(text)), *(len(mark.findall(plain)) for mark in _MARKS)]


def differences(pairs: Sequence[Pair]) -> Floats:
    """How much more of each the first response has, `[pairs, 4]`.

    As Arena-Hard's style control: of lengths (a - b) / (a + b), and of markdown, counted a word,
    (a - b) / (a + b + 1).
    """
    first = np.array([counts(pair.first) for pair in pairs], dtype=float).reshape(-1, len(COLUMNS))
    second = np.array([counts(pair.second) for pair in pairs], dtype=float).reshape(first.shape)
    length = np.maximum(first[:, :1] + second[:, :1], 1)
    a, b = (side[:, 1:] / np.maximum(side[:, :1], 1) for side in (first, second))
    return np.hstack([(first[:, :1] - second[:, :1]) / length, (a - b) / (a + b + 1)])


def covariates(pairs: Sequence[Pair]) -> tuple[Floats, list[str]]:
    """Columns of `differences` in units of their root mean square, and their names.

    They are not centred: a strength beside them is that at equal style, where centring would give
    it at the mean difference, and so call a policy strong for being longer in every pair. Columns
    in which no pair differs by more than rounding are left out.
    """
    found = differences(pairs)
    scale = np.sqrt((found**2).mean(axis=0)) if len(found) else np.zeros(len(COLUMNS))
    kept = scale > EXACT  # shares: their size is 1
    return found[:, kept] / scale[kept], [n for n, there in zip(COLUMNS, kept) if there]
