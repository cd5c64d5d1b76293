"""Token usage of answers, and its cost."""

from dataclasses import asdict, dataclass
from typing import Any

from alignment.judges.formats.answers import Answer


@dataclass(frozen=True)
class Prices:
    """Prices in dollars per million tokens; None where they are not known."""

    prompt: float | None = None
    completion: float | None = None


@dataclass(frozen=True)
class TokenUsage:
    """Token counts of answers, as the endpoint reports them.

    Attributes:
        answers: Number of answers.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens of the answers.
        uncounted: Number of answers for which the endpoint reports no usable usage. They are in no
            sum of tokens.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    @classmethod
    def of(cls, answer: Answer) -> "TokenUsage":
        """Return the usage of one answer."""
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        uncounted = int(prompt is None or completion is None)
        return cls(1, prompt or 0, completion or 0, uncounted)

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        """Return the usage of both."""
        return TokenUsage(
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.uncounted + other.uncounted,
        )

    def cost(self, prices: Prices) -> float | None:
        """Return the cost of the tokens that were counted, in dollars; None without prices."""
        if prices.prompt is None and prices.completion is None:
            return None
        pairs = (
            (self.prompt_tokens, prices.prompt), (self.completion_tokens, prices.completion)
        )  # fmt: skip
        return sum(tokens * (price or 0.0) for tokens, price in pairs) / 1e6

    def summary(self, prices: Prices) -> str:
        """Return the usage and its cost as text."""
        cost = self.cost(prices)
        tokens = f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        if cost is not None:
            tokens = f"{tokens}, {'at least ' if self.uncounted else ''}${cost:,.4f}"
        if self.uncounted:
            tokens += f" (usage of {self.uncounted:,} answers unknown)"
        return tokens

    def to_json(self, prices: Prices) -> dict[str, Any]:
        """Return plain values; `dollars` is None where the usage of an answer is unknown."""
        dollars = None if self.uncounted else self.cost(prices)
        return asdict(self) | {"dollars": dollars}
