"""How fast an endpoint may be asked, and how long to wait after it failed."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Allowance:
    """So many units a minute, a minute's worth at most at once.

    What a call costs may be known only afterwards: then it is spent afterwards, and the next call
    waits until the debt is paid off.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self._rate, self._most, self._clock = per_minute / 60, per_minute, clock
        self._left, self._at = per_minute, clock()

    def spend(self, amount: float) -> None:
        self._refill()
        self._left -= amount

    def wait(self, amount: float) -> float:
        """Seconds until there are `amount` units; 0 when there are."""
        self._refill()
        missing = min(amount, self._most) - self._left
        # A rounding error is not worth a wait, which could be too short for any clock to pass.
        return missing / self._rate if missing > 1e-6 else 0.0

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now


class Pace:
    """When the next call may begin, for all that ask the same endpoint.

    Args:
        requests_per_minute, tokens_per_minute: None for as many as there are.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Clock | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._sleep = sleep
        self._requests = requests_per_minute and Allowance(requests_per_minute, self._clock)
        self._tokens = tokens_per_minute and Allowance(tokens_per_minute, self._clock)
        self._not_before, self._reason = float("-inf"), ""
        self._turn = asyncio.Lock()

    async def turn(self) -> None:
        """Wait for a turn, and take it."""
        async with self._turn:
            while (wait := self._wait())[0] > 0:
                await self._sleep(wait[0])
            if self._requests:
                self._requests.spend(1)

    @property
    def waiting(self) -> str:
        """For what the next call has to wait, and how long, or "" where it may begin."""
        seconds, reason = self._wait()
        return f"waiting {seconds:,.0f} s for {reason}" if seconds >= 1 else ""

    def used(self, tokens: int) -> None:
        """Count the tokens that a call took."""
        if self._tokens:
            self._tokens.spend(tokens)

    def hold(self, seconds: float, reason: str = "the endpoint") -> None:
        """Let nobody begin for so long, for a reason: the endpoint asked for it."""
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


def back_off(attempt: int, first: float, longest: float = 60.0) -> float:
    """Seconds before another try: drawn from 0 to first x 2^attempt, so that calls that failed
    together do not come back together."""
    return random.uniform(0, min(longest, first * 2.0 ** min(attempt, 30)))


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, of either form; None where it has neither.

    Args:
        now: seconds since the epoch.
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
