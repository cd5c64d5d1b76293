"""Estimate of the tokens, time and money of an annotation, before anything is spent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from alignment.endpoints.budget import Budget
from alignment.endpoints.token_counter import TokenCounter
from alignment.endpoints.usage import Prices, TokenUsage
from alignment.records import Message

CALLS_PER_REPLICA = 64
"""Default number of concurrent calls per replica of the model, for which its speed is stated."""

LABEL_TOKENS = 8
"""Assumed tokens of an answer that is a label alone."""

THINKING_TOKENS = 1500
"""Assumed tokens of an answer with thinking, of a generated response or of a rubric."""

_COUNTED_PROMPTS = 1000


@dataclass(frozen=True)
class Speed:
    """Bounds of the speed of an endpoint.

    Attributes:
        concurrency: Calls at a time.
        replicas: Replicas of the model behind the address.
        tokens_per_second: Answer tokens per second of one replica with `CALLS_PER_REPLICA` calls
            at a time, or None if it is not known.
        requests_per_minute: Limit of the calls per minute, or None.
        tokens_per_minute: Limit of the tokens of prompts and answers per minute, or None.
    """

    concurrency: int = CALLS_PER_REPLICA
    replicas: int = 1
    tokens_per_second: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def seconds(self, calls: int, prompt_tokens: float, answer_tokens: float) -> dict[str, float]:
        """Return the minimum duration of calls in seconds, by the reason for the bound.

        With fewer concurrent calls than `CALLS_PER_REPLICA` per replica, the speed is assumed to
        fall in proportion, because it then depends on memory traffic per token, not on arithmetic.
        """
        seconds = {}
        if self.tokens_per_second:
            rate = self.replicas * self.tokens_per_second
            rate *= min(1.0, self.concurrency / (CALLS_PER_REPLICA * self.replicas))
            speed = (
                f"{rate:,.0f} answer tokens/s: {self.replicas} replica(s) of "
                f"{self.tokens_per_second:,g} tokens/s, {self.concurrency:,} calls at a time"
            )
            seconds[speed] = answer_tokens / rate
        if self.requests_per_minute:
            limit = f"--requests-per-minute {self.requests_per_minute:,g}"
            seconds[limit] = calls / self.requests_per_minute * 60
        if self.tokens_per_minute:
            limit = f"--tokens-per-minute {self.tokens_per_minute:,g}"
            seconds[limit] = (prompt_tokens + answer_tokens) / self.tokens_per_minute * 60
        return seconds


@dataclass(frozen=True)
class CostEstimate:
    """Tokens, time and money that calls are expected to take.

    Attributes:
        calls: Number of calls.
        prompt_tokens: Tokens of all prompts.
        answer_tokens: Expected tokens of one answer.
        max_tokens: Maximum number of tokens of one answer.
        prices: Prices of the tokens.
        speed: Bounds of the speed.
        prompt_source: Method by which the tokens of the prompts are counted, as text.
        answer_source: Origin of the expected number of answer tokens, as text.
    """

    calls: int
    prompt_tokens: float
    answer_tokens: float
    max_tokens: int
    prices: Prices
    speed: Speed
    prompt_source: str
    answer_source: str

    @property
    def dollars(self) -> float | None:
        """Return the expected cost in dollars, or None if a price is not known."""
        return self.prices.cost(self.prompt_tokens, self.calls * self.answer_tokens)

    @property
    def most_dollars(self) -> float | None:
        """Return the cost in dollars if every answer has the maximum length, or None."""
        return self.prices.most(self.prompt_tokens, self.calls * self.max_tokens)

    @property
    def seconds(self) -> float | None:
        """Return the expected time in seconds, or None if the speed is not known.

        A rate limit alone is a lower bound, not an expectation.
        """
        if not self.speed.tokens_per_second:
            return None
        return max(self._seconds.values())

    @property
    def _seconds(self) -> dict[str, float]:
        answers = self.calls * self.answer_tokens
        return self.speed.seconds(self.calls, self.prompt_tokens, answers)

    def lines(self, budget: Budget) -> list[str]:
        """Return the estimate as lines of text.

        Args:
            budget: The budget of the calls.
        """
        calls, answers = self.calls, self.calls * self.answer_tokens
        rows = {
            "calls": f"{calls:,}",
            "prompt tokens": f"{self.prompt_tokens:,.0f}, {self.prompt_source}",
            "answer tokens": (
                f"{answers:,.0f} expected, {self.answer_tokens:,.0f} an answer "
                f"{self.answer_source}; at most {calls * self.max_tokens:,}, {self.max_tokens:,} "
                "an answer (--max-tokens)"
            ),
            "time": self._time(),
        }
        dollars, maximum = self.dollars, self.most_dollars
        if dollars is None:
            rows["cost"] = (
                "unknown: add --price-in and --price-out (price_in and price_out in a judge's "
                "file) in dollars per million tokens"
            )
        else:
            rows["cost"] = (
                f"{format_dollars(dollars)} expected, at most {format_dollars(maximum or 0.0)}"
            )
            if budget.spent:
                rows["cost"] += f"; {format_dollars(budget.spent)} spent before"
        if budget.max_cost is not None and dollars is not None:
            rows["budget"] = self._coverage(budget, dollars, maximum or 0.0)
        width = max(map(len, rows))
        return [f"  {name.ljust(width)}  {text}" for name, text in rows.items()]

    def _time(self) -> str:
        seconds = self._seconds
        if not seconds:
            return (
                "unknown until answers arrive: --tokens-per-second (tokens_per_second in a judge's "
                "file) states the speed of a replica"
            )
        reason = max(seconds, key=lambda name: seconds[name])
        about = "about" if self.speed.tokens_per_second else "at least"
        return f"{about} {format_hours(seconds[reason])} ({reason})"

    def _coverage(self, budget: Budget, dollars: float, maximum: float) -> str:
        assert budget.max_cost is not None
        left = max(0.0, budget.max_cost - budget.spent)
        text = f"{format_dollars(left)} of {format_dollars(budget.max_cost)} left"
        if maximum <= left:
            return f"{text}: enough for all calls"
        if dollars <= left:
            return f"{text}: enough if answers are as long as expected"
        share = int(self.calls * left / dollars)
        return f"{text}: enough for about {share:,} of {self.calls:,} calls"

    def revised(self, usage: TokenUsage, seconds: float) -> str:
        """Return a sentence on what the first answers imply for all calls.

        Args:
            usage: Usage of the first answers of the run.
            seconds: Duration of the first answers.
        """
        counted = usage.answers - usage.uncounted
        parts = []
        if counted:
            prompt, answer = (
                tokens / counted for tokens in (usage.prompt_tokens, usage.completion_tokens)
            )
            parts += [
                f"{prompt:,.0f} tokens in and {answer:,.0f} out an answer",
                f"{self.calls * answer:,.0f} answer tokens in all",
            ]
            revised = replace(self, prompt_tokens=self.calls * prompt, answer_tokens=answer)
            if revised.dollars is not None:
                parts.append(f"{format_dollars(revised.dollars)} in all")
        parts.append(f"{format_hours(self.calls * seconds / usage.answers)} in all")
        return f"after {usage.answers:,} answers: {', '.join(parts)}"


def count_prompt_tokens(
    prompts: Iterable[Sequence[Message]], number: int, counter: TokenCounter
) -> tuple[float, str]:
    """Return the number of prompt tokens, and the method of counting as text.

    Of many prompts, a thousand at equal distances are counted, and the rest is extrapolated by
    characters.

    Args:
        prompts: The messages of each prompt.
        number: Number of prompts.
        counter: Counter of the tokens of a prompt.
    """
    stride = max(1, -(-number // _COUNTED_PROMPTS))
    characters = sampled = tokens = 0
    for index, messages in enumerate(prompts):
        length = sum(len(message.content) for message in messages)
        characters += length
        if index % stride == 0:
            sampled += length
            tokens += counter.count(messages)
    if stride == 1:
        return tokens, counter.source
    scale = characters / max(1, sampled)
    return tokens * scale, f"{counter.source}, in one of every {stride:,} prompts"


def format_hours(seconds: float) -> str:
    """Return a duration in minutes or hours, such as "7.1 h"."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def format_dollars(dollars: float) -> str:
    """Return an amount with two or four decimals, such as "$0.0123" or "$41.50"."""
    return f"${dollars:,.{2 if dollars >= 1 else 4}f}"
