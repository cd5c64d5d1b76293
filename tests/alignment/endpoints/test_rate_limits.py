"""Tests of rate limits, with a simulated clock."""

import asyncio
from email.utils import formatdate
from itertools import pairwise

import pytest

from alignment.endpoints.rate_limits import RateLimiter, retry_after
from alignment.endpoints.retry import back_off


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def turns(count: int, tokens: int = 0, hold: float = 0.0, **limits: float) -> list[float]:
    """Return the times at which calls begin that are made as fast as the limit allows."""
    clock, began = Clock(), []

    async def run() -> None:
        pace = RateLimiter(clock=clock, sleep=clock.sleep, **limits)
        for number in range(count):
            await pace.acquire()
            began.append(clock.now)
            pace.count_tokens(tokens)
            if number == 0 and hold:
                pace.pause(hold)

    asyncio.run(run())
    return began


def test_requests_a_minute_are_not_exceeded_after_the_first_minutes_worth() -> None:
    began = turns(40, requests_per_minute=10)
    assert began[:10] == [0.0] * 10
    for at, later in pairwise(began[9:]):
        assert later - at == pytest.approx(6.0)


def test_token_limit_per_minute_holds_on_average() -> None:
    began = turns(31, tokens=500, tokens_per_minute=1000)
    # 30 calls took 15,000 tokens: 1,000 were there, a minute gives another 1,000.
    assert began[-1] == pytest.approx(60 * 14, abs=1)


def test_rate_limiter_pauses_all_calls() -> None:
    assert turns(3, hold=42.0) == [0.0, 42.0, 42.0]
    assert turns(2) == [0.0, 0.0]


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7", 0) == 7 and retry_after("0.5", 0) == 0.5
    assert retry_after(formatdate(1000, usegmt=True), 990) == 10
    assert retry_after(formatdate(1000, usegmt=True), 2000) == 0
    for nonsense in (None, "soon", "", "nan", "inf", "-3 minutes"):
        assert retry_after(nonsense, 0) is None


def test_back_off_doubles_up_to_a_limit() -> None:
    for attempt in range(12):
        most = min(60.0, 0.5 * 2**attempt)
        delays = [back_off(attempt, 0.5) for _ in range(300)]
        assert 0.8 * most < max(delays) <= most and min(delays) < 0.2 * most
    assert back_off(10_000, 0.5) <= 60
