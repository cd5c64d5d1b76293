"""Differences in style between two responses, which are known to influence judges."""

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
    """Count the words and punctuation marks, headers, list items and bold spans of a text.

    Code blocks contribute only words and punctuation marks.
    """
    plain = _CODE.sub("", text)
    return [len(_WORD.findall(text)), *(len(mark.findall(plain)) for mark in _MARKS)]


def differences(pairs: Sequence[Pair]) -> Floats:
    """Return how much more of each style feature the first response of a pair has.

    As in the style control of Arena-Hard, the difference of lengths is (a - b) / (a + b), and that
    of markdown elements per word is (a - b) / (a + b + 1).

    Returns:
        The differences, `[pairs, 4]`, with the columns `COLUMNS`.
    """
    first = np.array([counts(pair.first) for pair in pairs], dtype=float).reshape(-1, len(COLUMNS))
    second = np.array([counts(pair.second) for pair in pairs], dtype=float).reshape(first.shape)
    length = np.maximum(first[:, :1] + second[:, :1], 1)
    a, b = (side[:, 1:] / np.maximum(side[:, :1], 1) for side in (first, second))
    return np.hstack([(first[:, :1] - second[:, :1]) / length, (a - b) / (a + b + 1)])


def covariates(pairs: Sequence[Pair]) -> tuple[Floats, list[str]]:
    """Return the columns of `differences` in units of their root mean square, and their names.

    The columns are not centered, so that a strength fitted together with them is the strength at
    equal style. With centered columns it would be the strength at the mean difference, and a policy
    would count as strong because it is longer in every pair. Columns in which no pair differs by
    more than rounding are omitted.
    """
    values = differences(pairs)
    scale = np.sqrt((values**2).mean(axis=0)) if len(values) else np.zeros(len(COLUMNS))
    varies = scale > EXACT  # the differences are shares, of the order of 1
    names = [name for name, used in zip(COLUMNS, varies) if used]
    return values[:, varies] / scale[varies], names
