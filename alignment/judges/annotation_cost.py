"""Cost of an annotation: earlier costs, and the estimate for the remaining calls."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import read_answers
from alignment.endpoints.budget import Budget
from alignment.endpoints.cost_estimate import (
    LABEL_TOKENS,
    THINKING_TOKENS,
    CostEstimate,
    count_prompt_tokens,
    format_dollars,
)
from alignment.endpoints.token_counter import TokenCounter
from alignment.endpoints.usage import TokenUsage
from alignment.judges.formats.answers import Answer
from alignment.judges.kinds.combined import CombinedConfig
from alignment.judges.kinds.command_settings import AnnotationSettings
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.judges.kinds.judge_kind import JudgeConfig
from alignment.judges.kinds.score_pairs import questions_about_responses
from alignment.judges.questions import Question
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


def print_costs(config: JudgeConfig, questions: Sequence[Question], folder: Path) -> None:
    """Print what the judges at endpoints that a judge combines will cost, without asking them.

    Args:
        config: The judge.
        questions: Questions about responses or pairs.
        folder: Folder in which the answers of the endpoints are stored.

    Raises:
        BudgetSpent: The budget of a judge allows no further call; all costs are printed.
    """
    from alignment.judges.kinds.endpoint_judge import EndpointJudge

    about_responses = questions_about_responses(questions)
    parts = list(_endpoint_parts(config, about_responses))
    if not parts:
        print(
            f"{len(questions):,} questions; a judge of kind {config.kind} makes no calls and "
            "costs no tokens"
        )
    estimates, budgets, gated = [], [], False
    for name, part, own, is_gated in parts:
        judge = EndpointJudge(part, False, None, folder / f"{part.name}.answers")
        cost, budget, answered = judge.estimate(own)
        most = ", at most: a gate decides which of them are asked" if is_gated else ""
        print(f"{name}: {len(own):,} questions, {answered:,} answered before{most}")
        if cost.calls:
            print("\n".join(cost.lines(budget)), flush=True)
            budgets.append(budget)
        estimates.append(cost)
        gated = gated or is_gated
    if len(estimates) > 1:
        dollars = [cost.dollars for cost in estimates if cost.dollars is not None]
        sums = (
            f", {format_dollars(sum(dollars))} expected" if len(dollars) == len(estimates) else ""
        )
        most = "at most " if gated else ""
        print(f"together: {most}{sum(cost.calls for cost in estimates):,} calls{sums}")
    for budget in budgets:
        budget.check()


def _endpoint_parts(
    config: JudgeConfig, questions: Sequence[Question], name: str = "", gated: bool = False
) -> Iterator[tuple[str, EndpointJudgeConfig, Sequence[Question], bool]]:
    """Yield the judges at endpoints within a judge.

    Yields:
        The name of the judge within the others, its description, its questions, and whether a gate
        may leave some of them out.
    """
    if isinstance(config, EndpointJudgeConfig):
        yield name or config.name, config, questions, gated
    elif isinstance(config, CombinedConfig):
        for part, judge in config.parts.items():
            own = config.questions_of(part, questions)
            below = f"{name}/{part}" if name else part
            yield from _endpoint_parts(judge, own, below, gated or config.is_gated(part))


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
    return min(tokens, config.max_new_tokens), (
        "assumed (--answer-tokens, answer_tokens in a judge's file, states another number)"
    )
