"""Rule that decides how often and how long a failing call is repeated."""

import random
from dataclasses import dataclass

MAX_WAIT = 600.0
"""Default of the longest wait, in seconds, that an endpoint may request."""


@dataclass(frozen=True)
class RetryPolicy:
    """Rule that decides how often and how long a failing call is repeated.

    A call is given up after `tries` tries or, if `patience` is set, after so many seconds.

    Attributes:
        tries: Most tries of one call.
        patience: Seconds after which a call that keeps failing is given up, instead of `tries`.
        timeout: Seconds that one try may take, from connecting to the last byte; None for no limit.
        first_wait: Longest wait after the first failed try, in seconds; it doubles with each try.
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
        """Return whether a call is given up after so many failed tries and seconds."""
        return tries >= self.tries if self.patience is None else seconds > self.patience

    def wait(self, attempt: int) -> float:
        """Return the seconds to wait after a failed try, counted from 0."""
        return back_off(attempt, self.first_wait, self.longest_wait)


def back_off(attempt: int, first: float, longest: float = 60.0) -> float:
    """Return the seconds to wait before another try.

    They are drawn from 0 to `first` x 2^`attempt`, so that calls that failed together do not return
    together.

    Args:
        attempt: Number of the failed try, from 0.
        first: Bound of the wait after the first try, in seconds.
        longest: Bound of every wait, in seconds.
    """
    return random.uniform(0, min(longest, first * 2.0 ** min(attempt, 30)))
