"""Cost of an annotation: earlier costs, and the estimate for the remaining calls."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import read_answers
from alignment.endpoints.budget import Budget
from alignment.endpoints.cost_estimate import (
    LABEL_TOKENS,
    THINKING_TOKENS,
    CostEstimate,
    count_prompt_tokens,
)
from alignment.endpoints.token_counter import TokenCounter
from alignment.endpoints.usage import TokenUsage
from alignment.judges.formats.answers import Answer
from alignment.judges.kinds.command_settings import AnnotationSettings
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.records import Message


def open_budget(
    config: EndpointJudgeConfig,
    counted: Iterable[Path],
    messages: Callable[[str], Sequence[Message]] = lambda key: (),
) -> tuple[Budget, Callable[[str, Any], None]]:
    """Return the budget of a judge, and the function that counts a stored answer against it.

    Args:
        config: The judge.
        counted: Files of earlier paid answers, other than the store of this run.
        messages: Function that returns the messages of a key, or none if it is not known; answers
            without usage count with their maximum cost.
    """
    budget = Budget(config.prices, config.max_cost)

    def count(key: str, row: Any) -> None:
        usage = TokenUsage.of(Answer.from_row(row))
        bound = budget.bound(messages(key), config.max_new_tokens) if usage.uncounted else 0.0
        budget.count(usage, bound)

    for file in counted:
        for key, row in read_answers(file):
            count(key, row)
    return budget, count


def estimate_cost(
    config: EndpointJudgeConfig,
    settings: AnnotationSettings,
    prompts: Iterable[Sequence[Message]],
    calls: int,
    answers: Sequence[Answer],
) -> CostEstimate:
    """Return the cost estimate of the remaining calls of an annotation.

    Args:
        config: The judge.
        settings: Settings of the annotation.
        prompts: The messages of each call.
        calls: Number of calls.
        answers: Answers to other questions of the same annotation.

    Raises:
        UserError: The tokenizer of the judge cannot be used.
    """
    counter = TokenCounter.create(config.tokenizer, config.model)
    prompt_tokens, prompt_source = count_prompt_tokens(prompts, calls, counter)
    answer_tokens, answer_source = _expected_tokens(config, settings, answers)
    return CostEstimate(
        calls,
        prompt_tokens,
        answer_tokens,
        config.max_new_tokens,
        config.prices,
        config.speed,
        prompt_source,
        answer_source,
    )


def _expected_tokens(
    config: EndpointJudgeConfig, settings: AnnotationSettings, answers: Sequence[Answer]
) -> tuple[float, str]:
    """Return the expected number of tokens of an answer, and the origin of the number as text."""
    if config.answer_tokens is not None:
        return config.answer_tokens, "as stated (--answer-tokens)"
    counts = [answer.completion_tokens for answer in answers if answer.completion_tokens]
    if counts:
        return sum(counts) / len(counts), f"by the {len(counts):,} answers in the cache"
    label_alone = (
        settings.task == "judge" and config.thinking == "none" and not config.reasoning_effort
    )
    tokens = LABEL_TOKENS if label_alone else THINKING_TOKENS
    return min(tokens, config.max_new_tokens), "assumed (--answer-tokens states another number)"
