"""Tests of budgets: no schedule of calls exceeds them, and the remainder is used."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.endpoints.budget import Budget, BudgetSpent
from alignment.endpoints.endpoint_errors import EndpointError, ErrorKind
from alignment.endpoints.usage import Prices, TokenUsage
from alignment.records import Message
from megatron_ext.errors import UserError

PRICES = Prices(prompt=2.0, completion=10.0)
PROMPT = [Message("user", "0123456789")]
BOUND = (10 + 256) * 2 / 1e6 + 100 * 10 / 1e6


def answered(tokens: int) -> TokenUsage:
    return TokenUsage(1, 20, tokens)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.integers(1, 6),
    bounds=st.floats(0.2, 12.0),
    lengths=st.lists(st.integers(0, 100), min_size=30, max_size=30),
    seed=st.integers(0, 9),
)
def test_no_schedule_of_calls_exceeds_a_budget(
    calls: int, bounds: float, lengths: list[int], seed: int
) -> None:
    budget = Budget(PRICES, bounds * BOUND)
    draw, remaining, paid = random.Random(seed), iter(lengths), []

    async def work() -> None:
        for length in remaining:
            reservation = budget.reserve(PROMPT, 100)
            try:
                async with reservation:
                    for _ in range(draw.randrange(4)):
                        await asyncio.sleep(0)
                    if length % 7 == 0:  # the endpoint may bill as much as an answer of 100 tokens
                        paid.append(BOUND)
                        reason = "no answer within 1 seconds"
                        raise EndpointError(reason, ErrorKind.PASSING, may_be_billed=True)
                    reservation.answered(answered(length))
                    paid.append(20 * 2 / 1e6 + length * 10 / 1e6)
            except EndpointError:
                pass

    async def run() -> list[BaseException | None]:
        return await asyncio.gather(*(work() for _ in range(calls)), return_exceptions=True)

    ends = asyncio.run(run())
    assert budget.max_cost is not None
    assert sum(paid) == pytest.approx(budget.spent)
    assert budget.spent <= budget.max_cost + 1e-9
    assert budget.reserved == pytest.approx(0, abs=1e-12)
    assert all(end is None or isinstance(end, BudgetSpent) for end in ends)
    if len(paid) < len(lengths):  # it ended early, and no further call was certain to fit
        assert budget.spent + BOUND > budget.max_cost
        assert any(ends)


def test_answer_without_usage_counts_with_its_bound() -> None:
    budget = Budget(PRICES, 1.0)

    async def run() -> None:
        reservation = budget.reserve(PROMPT, 100)
        async with reservation:
            reservation.answered(TokenUsage(1, 0, 0, uncounted=1))

    asyncio.run(run())
    assert budget.spent == pytest.approx(BOUND)
    stored = Budget(PRICES, 1.0)
    stored.count(TokenUsage(1, 0, 0, uncounted=1), stored.bound(PROMPT, 100))
    stored.count(answered(5))
    assert stored.spent == pytest.approx(BOUND + (20 * 2 + 5 * 10) / 1e6)


@pytest.mark.parametrize("error", [EndpointError("status 429", ErrorKind.PASSING), UserError("x")])
def test_try_that_is_refused_costs_nothing(error: Exception) -> None:
    budget = Budget(PRICES, 1.0)

    async def run() -> None:
        async with budget.reserve(PROMPT, 100):
            raise error

    with pytest.raises(type(error)):
        asyncio.run(run())
    assert budget.spent == 0 == budget.reserved


def test_spent_budget_is_refused_at_once() -> None:
    budget = Budget(PRICES, 0.001)
    budget.check()
    budget.count(TokenUsage(1, 0, 100))
    with pytest.raises(BudgetSpent, match=r"--max-cost 0\.001: the answers so far cost \$0\.0010"):
        budget.check()
    with pytest.raises(UserError, match="requires the prices"):
        Budget(Prices(prompt=1.0), 5)


def test_cached_tokens_have_a_separate_price() -> None:
    prices = Prices(prompt=2.0, completion=10.0, cached_prompt=0.5)
    usage = TokenUsage(1, 1_000_000, 100_000, cached_tokens=400_000)
    assert usage.cost(prices) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 1.0)
    assert usage.cost(PRICES) == pytest.approx(3.0)
    assert usage.cost(Prices(prompt=2.0)) is None
    dear = Prices(prompt=2.0, completion=10.0, cached_prompt=2.5)  # writing to a cache
    assert dear.most(1_000_000, 0) == pytest.approx(2.5)
