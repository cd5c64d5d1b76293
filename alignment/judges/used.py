"""What answers took, in tokens and money."""

from dataclasses import asdict, dataclass
from typing import Any

from alignment.judges.client import Answer


@dataclass(frozen=True)
class Prices:
    """In dollars for a million tokens; None where they are not known."""

    prompt: float | None = None
    completion: float | None = None


@dataclass(frozen=True)
class Used:
    """Tokens, as the endpoint counts them."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, answer: Answer) -> "Used":
        return cls(1, answer.prompt_tokens, answer.completion_tokens)

    def __add__(self, other: "Used") -> "Used":
        return Used(
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def cost(self, prices: Prices) -> float | None:
        """In dollars."""
        if prices.prompt is None and prices.completion is None:
            return None
        pairs = (
            (self.prompt_tokens, prices.prompt), (self.completion_tokens, prices.completion)
        )  # fmt: skip
        return sum(tokens * (price or 0.0) for tokens, price in pairs) / 1e6

    def told(self, prices: Prices) -> str:
        """In words."""
        cost = self.cost(prices)
        tokens = f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        return tokens if cost is None else f"{tokens}, ${cost:,.4f}"

    def to_json(self, prices: Prices) -> dict[str, Any]:
        return asdict(self) | {"dollars": self.cost(prices)}
