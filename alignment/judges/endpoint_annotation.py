"""Annotation by a judge at an endpoint, from questions to the rows of the output."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import AnswerStore, read_answers
from alignment.endpoints.api_key import read_api_key
from alignment.endpoints.budget import Budget
from alignment.endpoints.chat_client import ChatClient, ChatRequest
from alignment.endpoints.client import RunCancelled, connect
from alignment.endpoints.cost_estimate import CostEstimate, format_dollars
from alignment.endpoints.pool import CancelToken
from alignment.endpoints.rate_limits import RateLimiter
from alignment.endpoints.usage import TokenUsage
from alignment.judges.annotation import AnnotationProgress, AnnotationRun
from alignment.judges.annotation_cost import estimate_cost, open_budget
from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.kinds.command_settings import AnnotationSettings
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.judges.questions import (
    AnnotationTask,
    JudgingTask,
    Question,
    ResponseTask,
    RubricTask,
)
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import OutputFile, count_outcomes, format_outcomes
from alignment.records import Pair, Verdict
from megatron_ext.errors import TooFewResults
from megatron_ext.progress import Progress

_RESULTS = {"generate": "response", "rubrics": "rubric"}


def annotate_by_endpoint(
    config: EndpointJudgeConfig,
    questions: Sequence[Question],
    output: OutputFile,
    settings: AnnotationSettings,
) -> int:
    """Ask the unanswered questions, write the rows of all questions, and return the exit status.

    Raises:
        UserError: If the run ended early for a reason that the user can fix; answers are stored.
        TooFewResults: If more questions have no result than allowed. The rows are still written if
            every question has an answer or has failed.
        BudgetSpent: If the budget allows no further call; answers are stored.
    """
    judge, task = _judge(config, settings, pairwise=isinstance(questions[0].item, Pair))
    if not settings.dry_run:
        output.check_or_create(_hash(judge))

    def request(question: Question) -> ChatRequest:
        return ChatRequest(
            config.model,
            task.messages(question),
            config.sampling,
            config.revision,
            question.sample,
            config.expected_score,
        )

    keys = [request(question).key for question in questions]
    by_key = dict(zip(keys, questions))
    cache = Path(settings.cache or f"{output.path}.answers.jsonl")
    budget, count_stored = open_budget(
        config,
        settings.counted,
        lambda key: task.messages(by_key[key]) if key in by_key else (),
    )

    def estimate(before: Mapping[str, Answer]) -> CostEstimate:
        """Print and return the cost estimate; raise BudgetSpent if no call can be paid."""
        missing = [key for key in by_key if key not in before]
        print(f"{len(by_key):,} questions, {len(before):,} answered before", flush=True)
        prompts = (task.messages(by_key[key]) for key in missing)
        answers = list(before.values())
        cost = estimate_cost(config, settings, prompts, len(missing), answers)
        if missing:
            print("\n".join(cost.lines(budget)), flush=True)
            budget.check()
        return cost

    def stored_answers(stored: Mapping[str, Any] | AnswerStore) -> dict[str, Answer]:
        """Return the answers of this run's questions among the stored ones."""
        answers = {key: Answer.from_row(stored[key]) for key in by_key if key in stored}
        if not isinstance(task, JudgingTask):
            return answers
        # An answer without log-probabilities is a fault of the server, and is requested again.
        return {key: a for key, a in answers.items() if not task.lacks_log_probs(a)}

    if settings.dry_run:
        stored = {}
        for key, row in read_answers(cache):
            count_stored(key, row)
            stored[key] = row
        estimate(stored_answers(stored))
        return 0
    begin = time.monotonic()
    with AnswerStore(cache, count_stored) as store:
        if store.torn_bytes:
            print(f"{cache}: removed the incomplete last line of a killed run")
        before = stored_answers(store)
        cost = estimate(before)
        missing = [key for key in by_key if key not in before]
        lacking = {
            key: reason
            for key, answer in before.items()
            if (reason := task.explain_lack(by_key[key], answer))
        }
        try:
            progress = asyncio.run(
                _ask(
                    config,
                    settings,
                    missing,
                    len(before),
                    lacking,
                    store,
                    budget,
                    cost,
                    lambda key: request(by_key[key]),
                    lambda key, answer: task.inspect(by_key[key], answer),
                    lambda key, answer: task.explain_lack(by_key[key], answer),
                )
            )
        except RunCancelled as cancelled:
            count = sum(key in store for key in by_key)
            print(
                f"stopped: repeat the command to resume, with {count:,} answers stored", flush=True
            )
            return 128 + int(cancelled.args[0])
        answers = {key: Answer.from_row(store[key]) for key in by_key if key in store}
    failed = progress.failed
    rows = [
        task.record(question, answers.get(key), failed.get(key, ""))
        for key, question in zip(keys, questions)
    ]
    records = [row for row in rows if row is not None]
    prices = config.prices
    usage = sum(map(TokenUsage.of, answers.values()), TokenUsage())
    models = Counter(answer.model for answer in answers.values() if answer.model)
    about: dict[str, Any] = {"judge": judge, "used": usage.to_json(prices), "models": dict(models)}
    if settings.task == "judge":
        about["outcomes"], summary = count_outcomes(records), format_outcomes(records)
    else:
        noun = "prompts with rubrics" if settings.task == "rubrics" else "responses"
        summary = f"{len(records):,} {noun}"
    output.write(records, about)
    print(
        f"{summary}; {usage.summary(prices)}; {progress.usage.answers:,} new answers: "
        f"{progress.usage.summary(prices)}, {time.monotonic() - begin:.1f} s; wrote {output.path}"
    )
    if failed:
        print(f"{len(failed):,} calls failed: repeat the command to ask these again")
    if settings.task == "judge":
        reasons = reasons_of(record for record in records if isinstance(record, Verdict))
    else:
        by_reason = {key: task.explain_lack(by_key[key], a) for key, a in answers.items()} | failed
        reasons = [by_reason[key] for key in keys if by_reason[key]]
    result = _RESULTS.get(settings.task, "verdict")
    require_results(reasons, len(questions), settings.max_failed, lack=result)
    return 0


def _judge(
    config: EndpointJudgeConfig, settings: AnnotationSettings, pairwise: bool
) -> tuple[dict[str, Any], AnnotationTask]:
    """Return the settings on which the answers and their parsing depend, and the task."""
    judge: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        "sampling": asdict(config.sampling),
    }
    if settings.task == "rubrics":
        template = judge_prompt("rubric")
        judge |= {"form": template.identity}
        return judge, RubricTask(template.messages)
    if settings.task == "generate":
        return judge, ResponseTask(config.model, _hash(judge))
    judge_format = JudgeFormat.create(pairwise, config.template, config.thinking)
    judge |= {"form": judge_format.identity, "expected_score": config.expected_score}
    return judge, JudgingTask(judge_format, _hash(judge), config.expected_score)


def _hash(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _describe(usage: TokenUsage, budget: Budget) -> str:
    """Return the usage and the spent budget of a run, for the progress line."""
    summary = usage.summary(budget.prices)
    if budget.max_cost is None:
        return summary
    return f"{summary}, {format_dollars(budget.spent)} of {format_dollars(budget.max_cost)} spent"


async def _ask(
    config: EndpointJudgeConfig,
    settings: AnnotationSettings,
    keys: Sequence[str],
    answered_before: int,
    lacking: Mapping[str, str],
    store: AnswerStore,
    budget: Budget,
    cost: CostEstimate,
    request: Callable[[str], ChatRequest],
    inspect: Callable[[str, Answer], str],
    explain_lack: Callable[[str, Answer], str],
) -> AnnotationProgress:
    cancel = CancelToken()
    limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute, sleep=cancel.sleep)
    key = read_api_key(config.api_key_variable)
    async with connect(key, config.calls_at_a_time) as http:
        with Progress("asking", len(keys), "answers") as progress:
            client = ChatClient(
                config.url,
                http,
                config.retry_policy,
                limiter,
                cancel.sleep,
                progress.log,
                budget=budget,
            )
            run = AnnotationRun(
                keys,
                request,
                store,
                client,
                cancel,
                inspect,
                explain_lack,
                answered_before,
                config.calls_at_a_time,
                settings.max_failed,
                lambda counts: _describe(counts.usage, budget),
                cost.revised,
            )
            run.counts.lacking.update(lacking)
            try:
                return await run.run(progress)
            except TooFewResults:
                if run.counts.done < len(keys):
                    raise
                return run.counts  # Every question has an outcome, so that the file is complete.
