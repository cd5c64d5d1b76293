"""Rate limits of an endpoint, and the wait that it requests."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Allowance:
    """Allowance of units per minute, of which at most one minute's can be spent at once.

    If the cost of a call is known only afterwards, it is deducted then, and the next call waits
    until the allowance is positive again.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._rate, self._most, self._clock = per_minute / 60, per_minute, clock
        self._left, self._at = per_minute, clock()

    def spend(self, amount: float) -> None:
        """Spend units, even more than are available."""
        self._refill()
        self._left -= amount

    def wait(self, amount: float) -> float:
        """Return the seconds until `amount` units are available."""
        self._refill()
        missing = min(amount, self._most) - self._left
        # A wait for a rounding error could be too short for the clock.
        return missing / self._rate if missing > 1e-6 else 0.0

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now


class RateLimiter:
    """Rate limits that all calls of an endpoint share."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Clock | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """Create the limits.

        Args:
            requests_per_minute: Maximum number of requests per minute, or None for no limit.
            tokens_per_minute: Maximum number of tokens per minute, or None for no limit.
            clock: Function that returns the time in seconds. Default: the event loop's.
            sleep: Function that waits.
        """
        self._clock = clock or asyncio.get_running_loop().time
        self._sleep = sleep
        self._requests = requests_per_minute and Allowance(requests_per_minute, self._clock)
        self._tokens = tokens_per_minute and Allowance(tokens_per_minute, self._clock)
        self._not_before, self._reason = float("-inf"), ""
        self._turn = asyncio.Lock()

    def enter_loop(self) -> None:
        """Apply the same limits to the calls of another event loop, one loop at a time."""
        self._turn = asyncio.Lock()

    async def acquire(self) -> None:
        """Wait until the next call may begin, and count it."""
        async with self._turn:
            while (wait := self._wait())[0] > 0:
                await self._sleep(wait[0])
            if self._requests:
                self._requests.spend(1)

    @property
    def waiting(self) -> str:
        """Return the reason and length of the wait of the next call, or "" if it may begin."""
        seconds, reason = self._wait()
        return f"waiting {seconds:,.0f} s for {reason}" if seconds >= 1 else ""

    def count_tokens(self, tokens: int) -> None:
        """Count the tokens of a call."""
        if self._tokens:
            self._tokens.spend(tokens)

    def pause(self, seconds: float, reason: str = "the endpoint") -> None:
        """Delay all further calls for some seconds.

        Args:
            seconds: The wait that the endpoint requests.
            reason: Reason of the wait, for the progress line.
        """
        end = self._clock() + seconds
        if end > self._not_before:
            self._not_before, self._reason = end, reason

    def _wait(self) -> tuple[float, str]:
        waits = [(self._not_before - self._clock(), self._reason)]
        if self._requests:
            waits.append((self._requests.wait(1), "--requests-per-minute"))
        if self._tokens:
            waits.append((self._tokens.wait(1), "--tokens-per-minute"))
        return max(waits)


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header requests, or None if it is not valid.

    Args:
        value: The header, either seconds or a date.
        now: The current time, in seconds since the epoch.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None
