"""Rule for the number and the delay of repetitions of a failing call."""

import random
from dataclasses import dataclass

MAX_WAIT = 600.0
"""Default of the longest wait, in seconds, that an endpoint may request."""


@dataclass(frozen=True)
class RetryPolicy:
    """Rule for the number and the delay of repetitions of a failing call.

    A call fails after `tries` attempts or, if `patience` is set, after that many seconds.

    Attributes:
        tries: Maximum number of attempts of one call.
        patience: Seconds after which a failing call is not repeated any more, instead of `tries`.
        timeout: Seconds that one attempt may take, from connecting to the last byte; None for no
        limit.
        first_wait: Longest wait after the first failed attempt, in seconds; it doubles each time.
        longest_wait: Bound of that wait, in seconds.
        max_wait: Longest wait that the endpoint may request, in seconds.
    """

    tries: int = 7
    patience: float | None = None
    timeout: float | None = 600.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    max_wait: float = MAX_WAIT

    def gives_up(self, tries: int, seconds: float) -> bool:
        """Return whether a call fails for good after some failed attempts and seconds."""
        return tries >= self.tries if self.patience is None else seconds > self.patience

    def wait(self, attempt: int) -> float:
        """Return the seconds to wait after a failed attempt, counted from 0."""
        return back_off(attempt, self.first_wait, self.longest_wait)


def back_off(attempt: int, first: float, longest: float = 60.0) -> float:
    """Return the seconds to wait before another attempt.

    They are drawn from 0 to `first` x 2^`attempt`, so that calls that failed at the same time are
    not repeated at the same time.

    Args:
        attempt: Number of the failed attempt, from 0.
        first: Bound of the wait after the first attempt, in seconds.
        longest: Bound of every wait, in seconds.
    """
    return random.uniform(0, min(longest, first * 2.0 ** min(attempt, 30)))
