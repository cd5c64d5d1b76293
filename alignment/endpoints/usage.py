"""Token usage of answers, and its cost."""

from dataclasses import asdict, dataclass
from typing import Any

from alignment.judges.formats.answers import Answer


@dataclass(frozen=True)
class Prices:
    """Prices in dollars per million tokens; None if they are not known.

    Attributes:
        prompt: Price of the tokens of prompts.
        completion: Price of the tokens of answers, with their thinking.
        cached_prompt: Price of the tokens of prompts that the endpoint had cached. Default: that of
            all tokens of prompts.
    """

    prompt: float | None = None
    completion: float | None = None
    cached_prompt: float | None = None

    def cost(
        self, prompt_tokens: float, completion_tokens: float, cached_tokens: float = 0
    ) -> float | None:
        """Return the price of tokens in dollars, or None if a price is not known.

        Args:
            prompt_tokens: Tokens of prompts, cached ones included.
            completion_tokens: Tokens of answers.
            cached_tokens: Number of prompt tokens that the endpoint had cached.
        """
        if self.prompt is None or self.completion is None:
            return None
        cached = self.prompt if self.cached_prompt is None else self.cached_prompt
        new = (prompt_tokens - cached_tokens) * self.prompt
        return (new + cached_tokens * cached + completion_tokens * self.completion) / 1e6

    def most(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return the maximum cost of tokens in dollars, however many of them are cached.

        Writing to a cache may cost more than a token that is not cached.
        """
        costs = [
            self.cost(prompt_tokens, completion_tokens, cached) for cached in (0, prompt_tokens)
        ]
        return max((cost for cost in costs if cost is not None), default=None)


@dataclass(frozen=True)
class TokenUsage:
    """Token counts of answers, as the endpoint reports them.

    Attributes:
        answers: Number of answers.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens of the answers.
        uncounted: Number of answers without a usable usage. The sums of tokens omit them.
        cached_tokens: Those of the prompts' tokens that the endpoint had cached.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cached_tokens: int = 0

    @classmethod
    def of(cls, answer: Answer) -> "TokenUsage":
        """Return the usage of one answer."""
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        if prompt is None or completion is None:
            return cls(1, prompt or 0, completion or 0, uncounted=1)
        return cls(1, prompt, completion, cached_tokens=min(answer.cached_tokens or 0, prompt))

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        """Return the usage of both."""
        return TokenUsage(
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.uncounted + other.uncounted,
            self.cached_tokens + other.cached_tokens,
        )

    def cost(self, prices: Prices) -> float | None:
        """Return the cost of the counted tokens in dollars; None without prices."""
        return prices.cost(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def summary(self, prices: Prices) -> str:
        """Return the usage and its cost as text."""
        cost = self.cost(prices)
        cached = f" ({self.cached_tokens:,} of them cached)" if self.cached_tokens else ""
        tokens = f"{self.prompt_tokens:,} tokens in{cached}, {self.completion_tokens:,} out"
        if cost is not None:
            tokens = f"{tokens}, {'at least ' if self.uncounted else ''}${cost:,.4f}"
        if self.uncounted:
            tokens += f" (usage of {self.uncounted:,} answers unknown)"
        return tokens

    def to_json(self, prices: Prices) -> dict[str, Any]:
        """Return plain values; `dollars` is None if the usage of an answer is unknown."""
        dollars = None if self.uncounted else self.cost(prices)
        return asdict(self) | {"dollars": dollars}
