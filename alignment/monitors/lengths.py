"""What length of a response is usual, robust against those that are not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of a normal distribution, the standard deviation is this many median absolute deviations.
_DEVIATIONS = 1.4826
_SPREAD = 3.0
_LEAST_FACTOR = 2.0


@dataclass(frozen=True)
class Lengths:
    """Lengths in words, by the median and the median absolute deviation of their logarithms.

    Lengths are skewed; of their logarithms the spread is about the same on both sides.
    """

    median: float
    limit: float

    @classmethod
    def of(cls, words: Sequence[int]) -> "Lengths":
        """Of the numbers of words of some responses, at least one.

        A response is long that has more words than `limit`: three robust standard deviations
        above the median, and at least twice the median.
        """
        logs = np.log1p(np.asarray(words, dtype=np.float64))  # [responses]
        middle = float(np.median(logs))
        spread = _DEVIATIONS * float(np.median(np.abs(logs - middle)))
        far = max(_SPREAD * spread, math.log(_LEAST_FACTOR))
        # Rounded, so that a length at the limit is not beyond it by an error of the logarithms.
        return cls(round(math.expm1(middle), 6), round(math.expm1(middle + far), 6))
