"""Reference lengths of responses, robust against outliers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The standard deviation of a normal distribution is this many median absolute deviations.
_DEVIATIONS = 1.4826
_MAX_DEVIATIONS = 3.0
_MIN_FACTOR = 2.0


@dataclass(frozen=True)
class ReferenceLengths:
    """Typical length of responses, and the length above which a response counts as verbose.

    Lengths are skewed, but their logarithms spread about equally on both sides. Therefore the
    limit is computed from the median and the median absolute deviation of the logarithms.

    Attributes:
        median: Median length, in words.
        limit: Three robust standard deviations above the median and at least twice the median, in
            words.
    """

    median: float
    limit: float

    @classmethod
    def from_words(cls, words: Sequence[int]) -> "ReferenceLengths":
        """Return the reference lengths of some responses.

        Args:
            words: Number of words of each response; at least one response.
        """
        logs = np.log1p(np.asarray(words, dtype=np.float64))  # [responses]
        middle = float(np.median(logs))
        spread = _DEVIATIONS * float(np.median(np.abs(logs - middle)))
        distance = max(_MAX_DEVIATIONS * spread, math.log(_MIN_FACTOR))
        # Rounded, so that a length at the limit is not beyond it by an error of the logarithms.
        return cls(round(math.expm1(middle), 6), round(math.expm1(middle + distance), 6))
