"""Parts of the lines in which training reports its progress."""

import math
import time
from collections import deque
from collections.abc import Iterable


class RemainingTime:
    """Estimate of the time until the last step, from the durations of recent steps.

    Evaluations and checkpoints between the steps count, because they also occur between the
    remaining steps.
    """

    WINDOW = 100  # steps

    def __init__(self, total: int) -> None:
        """Start the clock.

        Args:
            total: Number of the last step.
        """
        self.total = total
        self._times: deque[tuple[int, float]] = deque(maxlen=self.WINDOW + 1)

    def finish_step(self, step: int) -> None:
        """Record that a step is finished."""
        self._times.append((step, time.monotonic()))

    @property
    def seconds(self) -> float | None:
        """Seconds until the last step; None before two steps are finished."""
        if len(self._times) < 2:
            return None
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (self.total - last) * (end - begin) / (last - first)

    def __str__(self) -> str:
        seconds = self.seconds
        return "remaining time unknown" if seconds is None else f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    >>> clock(3723.4), clock(200_000)
    ('1:02:03', '2 d 7:33:20')
    """
    days, rest = divmod(round(seconds), 86400)
    hours, minutes = rest // 3600, rest // 60 % 60
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{rest % 60:02}"


def short(count: float) -> str:
    """Return a large number with three digits and a unit.

    >>> short(999), short(2_943_808), short(10_000_000_000)
    ('999', '2.94 M', '10.0 B')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            digits = 2 - int(math.log10(count / size))
            return f"{count / size:.{max(digits, 0)}f} {unit}"
    return f"{count:,.0f}"


def step_of(step: int, total: int) -> str:
    """Return the step in a width that does not change."""
    return f"step {step:>{len(f'{total:,}')},}/{total:,}"


def report_line(parts: Iterable[str], alarms: Iterable[str] = ()) -> str:
    """Return the line of a report; alarms come last.

    Args:
        parts: Parts of the line; empty ones are left out.
        alarms: Alarms, which are shown after the word ATTENTION.
    """
    alarms = list(alarms)
    warning = [f"ATTENTION: {', '.join(alarms)}"] if alarms else []
    return " | ".join([*filter(None, parts), *warning])
