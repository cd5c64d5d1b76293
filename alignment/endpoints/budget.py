"""Budget of the calls of an endpoint, which is never exceeded.

The cost of a call is known only when it is answered. Before it begins, every attempt of a call
therefore reserves the maximum that it may cost: all characters of the prompt as tokens, and an
answer of `max_tokens`. When the answer arrives, its usage replaces the reservation. If the
reservations of the calls in progress would exceed the budget, further calls wait for their answers.
The run ends only when not even one more call is certain to be within the budget.
"""

import asyncio
from collections.abc import Sequence
from types import TracebackType

from alignment.endpoints.endpoint_errors import EndpointError
from alignment.endpoints.usage import Prices, TokenUsage
from alignment.records import Message
from megatron_ext.errors import LimitExceeded, UserError

_TEMPLATE_TOKENS = 256  # maximum number of tokens that a chat template adds to each message
_ROUNDING = 1e-9  # dollars


class BudgetSpent(LimitExceeded):
    """Budget from which no further call can be paid with certainty."""


class Budget:
    """Budget in dollars of the calls of an endpoint; use it from one event loop at a time.

    Attributes:
        prices: Prices of the endpoint.
        max_cost: Maximum cost of all calls in dollars, or None for no limit.
        usage: Token usage of all answers that were counted.
        reserved: Maximum cost of the calls in progress, in dollars.
    """

    def __init__(
        self, prices: Prices, max_cost: float | None = None, source: str = "--max-cost"
    ) -> None:
        """Create a budget of which nothing has been spent.

        Args:
            prices: Prices of the endpoint.
            max_cost: Maximum cost of all calls in dollars, or None for no limit.
            source: The flag or key that sets the limit, for messages.

        Raises:
            UserError: There is a limit, and a price is unknown.
        """
        if max_cost is not None and prices.cost(0, 0) is None:
            raise UserError(
                f"{source} requires the prices of the endpoint. Add --price-in and --price-out "
                "(price_in and price_out in a judge's file) in dollars per million tokens."
            )
        self.prices, self.max_cost, self._source = prices, max_cost, source
        self.usage = TokenUsage()
        self.reserved = 0.0
        self._uncounted = 0.0  # dollars of attempts and answers without usage, by their bounds
        self._calls = 0  # in progress
        self._changed = asyncio.Event()

    @property
    def spent(self) -> float:
        """Return the dollars spent so far; 0 if prices are unknown.

        Answers without usage and attempts that were lost in transmission count with the maximum
        that they may have cost.
        """
        return (self.usage.cost(self.prices) or 0.0) + self._uncounted

    def count(self, usage: TokenUsage, bound: float = 0.0) -> None:
        """Count earlier costs, such as the usage of a stored answer.

        Args:
            usage: The usage.
            bound: Dollars that each answer of unknown usage counts, see `bound`.
        """
        self._uncounted += usage.uncounted * bound
        if not usage.uncounted:
            self.usage += usage

    def check(self) -> None:
        """Raise `BudgetSpent` if nothing of the budget is left."""
        if self.max_cost is not None and self.spent >= self.max_cost - _ROUNDING:
            raise BudgetSpent(
                f"{self._source} {self.max_cost:g}: the answers so far cost ${self.spent:,.4f}, so "
                f"that nothing is left. {self._advice}"
            )

    def reserve(self, messages: Sequence[Message], max_tokens: int) -> "Reservation":
        """Return the reservation for the successive attempts of a call.

        Args:
            messages: The prompt of the call.
            max_tokens: Maximum number of tokens of the answer.
        """
        return Reservation(self, self.bound(messages, max_tokens))

    def bound(self, messages: Sequence[Message], max_tokens: int) -> float:
        """Return the maximum cost of a call in dollars; 0 if prices are unknown.

        No tokenizer in use produces more tokens than a text has bytes in UTF-8.

        Args:
            messages: The prompt of the call.
            max_tokens: Maximum number of tokens of the answer.
        """
        texts = (message.content.encode(errors="replace") for message in messages)
        prompt_tokens = sum(len(text) + _TEMPLATE_TOKENS for text in texts)
        return self.prices.most(prompt_tokens, max_tokens) or 0.0

    async def acquire(self, dollars: float) -> None:
        """Reserve dollars for an attempt, once it fits next to the calls in progress.

        Raises:
            BudgetSpent: It does not fit, although no other call is in progress.
        """
        limit = self.max_cost
        while limit is not None and self.spent + self.reserved + dollars > limit + _ROUNDING:
            if not self._calls:
                raise BudgetSpent(
                    f"{self._source} {limit:g}: the answers so far cost ${self.spent:,.4f}, and "
                    f"one more call may cost up to ${dollars:,.4f}. {self._advice}"
                )
            await self._changed.wait()
        self.reserved += dollars
        self._calls += 1

    def settle(self, dollars: float, usage: TokenUsage, lost: bool) -> None:
        """Replace a reservation by the cost of the attempt.

        Args:
            dollars: The reservation.
            usage: The usage of the answer; an empty usage if there is none.
            lost: Whether the attempt has no answer but may be billed.
        """
        self.reserved = self.reserved - dollars if self._calls > 1 else 0.0
        self._calls -= 1
        if usage.uncounted or lost:
            self._uncounted += dollars
        else:
            self.usage += usage
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def _advice(self) -> str:
        return "Repeat the command with a higher limit to resume; all answers are stored."


class Reservation:
    """Reservation for each attempt of a call, used as `async with reservation:`."""

    def __init__(self, budget: Budget, dollars: float) -> None:
        self._budget, self.dollars = budget, dollars
        self._usage: TokenUsage | None = None

    def answered(self, usage: TokenUsage) -> None:
        """Record the usage of the answer to the attempt in progress."""
        self._usage = usage

    async def __aenter__(self) -> None:
        """Wait until the attempt fits into the budget.

        Raises:
            BudgetSpent: It does not fit.
        """
        self._usage = None
        await self._budget.acquire(self.dollars)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count the cost of the attempt."""
        lost = self._usage is None and (
            isinstance(error, asyncio.CancelledError)
            or (isinstance(error, EndpointError) and error.may_be_billed)
        )
        self._budget.settle(self.dollars, self._usage or TokenUsage(), lost)
