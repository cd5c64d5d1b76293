"""Judge at an endpoint, which the ranks of a training run call."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import AnswerStore, read_answers
from alignment.endpoints.api_key import read_api_key
from alignment.endpoints.budget import Budget, BudgetSpent
from alignment.endpoints.chat_client import ChatClient, ChatRequest
from alignment.endpoints.client import CallFailed, connect
from alignment.endpoints.cost_estimate import CostEstimate
from alignment.endpoints.pool import EndpointPool
from alignment.endpoints.rate_limits import RateLimiter
from alignment.endpoints.usage import TokenUsage
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.annotation_cost import estimate_cost
from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.kinds.command_settings import AnnotationSettings
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.judges.questions import JudgingTask, Question
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from alignment.records import Verdict
from alignment.rounding import EXACT, SINGLE
from megatron_ext.console import console
from megatron_ext.errors import UserError

_COUNTS = ("answers", "prompt_tokens", "completion_tokens")


class EndpointJudge:
    """Judge at an endpoint.

    One rank of each share of the data asks, and stores the answers.
    """

    batch_size = 1024

    def __init__(
        self,
        config: EndpointJudgeConfig,
        pairwise: bool,
        engine: AlignmentEngine | None,
        store: Path,
    ) -> None:
        """Create the judge; a collective.

        Args:
            config: The description of the judge.
            pairwise: Whether the judge compares pairs instead of scoring responses.
            engine: The engine whose ranks ask, or None in a command of one process.
            store: The folder for the answers.

        Raises:
            UserError: If the prompt template cannot be used.
        """
        source = f"The judge {config.name}: template"
        judge_format = JudgeFormat.create(pairwise, config.template, config.thinking, source)
        self._config, self._engine, self._store = config, engine, store
        self._expected = config.expected_score and not pairwise
        depends = [
            config.model,
            config.revision,
            asdict(config.sampling),
            judge_format.identity,
            self._expected,
        ]
        self.identity = sha256(json.dumps(depends).encode()).hexdigest()
        # The dtype of the server is not known. Equal responses are one question and one call.
        self.rounding_error = SINGLE if self._expected else EXACT
        self._task = JudgingTask(judge_format, self.identity, self._expected)
        self._reported: set[str] = set()
        rank, self._shares = (engine.data_rank, engine.data_size) if engine else (0, 1)
        self._asks = engine is None or is_share_leader(engine)
        self._file = store / f"share_{rank:05d}.jsonl"
        # One rank counts the answers of earlier runs, before any rank asks: the round begins with
        # a collective.
        self._before = _dollars_of(config, store) if self._asks and not rank else 0.0
        self._usage, self._dollars = TokenUsage(), 0.0  # of this process
        requests, tokens = config.requests_per_minute, config.tokens_per_minute
        self._limiter = RateLimiter(
            requests and requests / self._shares,
            tokens and tokens / self._shares,
            clock=time.monotonic,
        )

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Return the verdicts on questions; see `Judge`.

        A call that failed in every attempt is a failed verdict.

        Raises:
            UserError: If the endpoint will answer no question, or answers cannot be stored.
            LimitExceeded: If `max_cost` does not pay for another call.
        """
        check()
        rows: list[Any] = []
        problem: UserError | None = None
        name, spent, begin = self._config.name, self.usage()["dollars_total"], self._dollars
        try:
            verdicts = self._run(questions, spent, check)
            rows = [verdict.to_row() for verdict in verdicts or []]
        except BudgetSpent:
            problem = BudgetSpent(
                f"The judge {name}: max_cost {self._config.max_cost:g} does not pay for another "
                f"call: the answers of this run cost ${spent + self._dollars - begin:,.4f} so far. "
                "Raise max_cost in the judge's file and repeat the command to resume; all answers "
                "are stored."
            )
        except UserError as error:  # No question will be answered.
            problem = type(error)(f"the judge {name}: {error}")
        except OSError as error:
            problem = UserError(
                f"The judge {name} cannot store its answers in {self._store}: {error}"
            )
        shares = self._gather((rows, problem))
        if first := next((problem for _, problem in shares if problem), None):
            raise first
        verdict_rows = shares[self._engine.data_rank if self._engine else 0][0]
        return [Verdict.from_row(row) for row in verdict_rows]

    def estimate(self, questions: Sequence[Question]) -> tuple[CostEstimate, Budget, int]:
        """Return what questions will cost, without asking them.

        Returns:
            The estimate of the questions without a stored answer, the budget with what the stored
            answers cost, and the number of the questions that have one.
        """
        requests = {request.key: request for request in map(self._request, questions)}
        budget = Budget(
            self._config.prices, self._config.max_cost, f"The judge {self.name}: max_cost"
        )
        answers: dict[str, Answer] = {}
        for key, row in _stored_answers(self._store):
            answer = Answer.from_row(row)
            budget.count(TokenUsage.of(answer))
            if key in requests:
                answers[key] = answer
        missing = [request.messages for key, request in requests.items() if key not in answers]
        cost = estimate_cost(
            self._config, AnnotationSettings(), missing, len(missing), list(answers.values())
        )
        return cost, budget, len(answers)

    def usage(self) -> dict[str, float]:
        """Gather the usage and cost of the answers of all ranks and of earlier runs.

        Returns:
            `answers`, `prompt_tokens` and `completion_tokens` of the answers since the process
            began, and the dollars of all answers of the run, `dollars_total`; 0 without prices.
        """
        counts = {name: getattr(self._usage, name) for name in _COUNTS}
        shares = self._gather(counts | {"dollars_total": self._before + self._dollars})
        return {name: sum(share[name] for share in shares) for name in shares[0]}

    @property
    def name(self) -> str:
        """Return the name of the judge."""
        return self._config.name

    @property
    def priced(self) -> bool:
        """Return whether the prices of the endpoint are known."""
        return self._config.prices.cost(0, 0) is not None

    def _request(self, question: Question) -> ChatRequest:
        return ChatRequest(
            self._config.model,
            self._task.messages(question),
            self._config.sampling,
            self._config.revision,
            question.sample,
            self._expected,
        )

    def _gather(self, value: Any) -> list[Any]:
        return [value] if self._engine is None else all_gather_by_data_rank(self._engine, value)

    def _run(
        self, questions: Sequence[Question], spent: float, check: Callable[[], None]
    ) -> list[Verdict] | None:
        """Ask from the leader of each share of the data, while the other ranks poll for signals."""
        if self._engine is None:
            return asyncio.run(self._ask(questions, spent))
        work = partial(self._ask, questions, spent) if self._asks else None
        return run_async_while_polling(work, check)

    async def _ask(self, questions: Sequence[Question], spent: float) -> list[Verdict]:
        requests = [self._request(question) for question in questions]
        keys = [request.key for request in requests]
        store = _open_store(self._file)
        missing = {key: r for key, r in zip(keys, requests) if key not in store}
        stored = [key for key in missing if key in self._answers_of_others]
        if stored:
            rows = [(key, _read_answer(*self._answers_of_others[key])) for key in stored]
            await asyncio.to_thread(store.add, rows)
        answers = {key: Answer.from_row(store[key]) for key in keys if key in store}
        for answer in answers.values():
            self._check(answer)
        failed: dict[str, str] = {}

        def on_answer(key: str, answer: Answer) -> None:
            self._check(answer)
            answers[key] = answer

        def on_failure(key: str, error: CallFailed) -> None:
            failed[key] = str(error)

        concurrency = self._config.calls_at_a_time
        left = self._config.max_cost and (self._config.max_cost - spent) / self._shares
        budget = Budget(self._config.prices, left)
        self._limiter.enter_loop()
        async with connect(read_api_key(self._config.api_key_variable), concurrency) as http:
            client = ChatClient(
                self._config.url.rstrip("/"),
                http,
                self._config.retry_policy,
                self._limiter,
                report=self._report,
                flag="url",
                budget=budget,
            )

            async def call(key: str) -> Answer:
                return await client.ask(missing[key])

            pool = EndpointPool(call, _to_record, concurrency, await_calls=False)
            remaining = [key for key in missing if key not in answers]
            try:
                await pool.ask_many(remaining, store, on_answer, on_failure)
            finally:
                self._usage += budget.usage
                self._dollars += budget.spent
        return [
            self._task.record(question, answers.get(key), failed.get(key, ""))
            for question, key in zip(questions, keys)
        ]

    def _report(self, message: str) -> None:
        """Print a message only once, however often the judge is called."""
        if message not in self._reported:
            self._reported.add(message)
            console.warn(f"the judge {self._config.name}: {message}")

    def _check(self, answer: Answer) -> None:
        """Raise a UserError if no answer of this endpoint can have an expected score."""
        if problem := self._task.lacks_log_probs(answer):
            raise UserError(
                f"The endpoint {self._config.url} returns no log-probabilities that can be used "
                f"({problem}), and the score is the expectation under them. Set expected_score: "
                "false in the judge's file, or use a server that returns them."
            )

    @cached_property
    def _answers_of_others(self) -> dict[str, tuple[Path, int]]:
        """Return the file and offset of answers in the files of other shares.

        When a run resumes on another number of ranks, a question belongs to another share.
        """
        places: dict[str, tuple[Path, int]] = {}
        for file in sorted(self._store.glob("share_*.jsonl")):
            if file == self._file:
                continue
            start = 0
            with file.open("rb") as stream:
                for line in stream:
                    if line.endswith(
                        b"\n"
                    ):  # other lines are torn, or just being written by their rank
                        places[json.loads(line)["key"]] = (file, start)
                    start += len(line)
        return places


def _dollars_of(config: EndpointJudgeConfig, store: Path) -> float:
    """Return the dollars of the answers in a folder; 0 without prices."""
    budget = Budget(config.prices)
    for _, row in _stored_answers(store):
        budget.count(TokenUsage.of(Answer.from_row(row)))
    return budget.spent


def _stored_answers(store: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the row of each answer in a folder once.

    A run that resumes on another number of ranks has copies of an answer in several files.
    """
    counted_keys = set()
    for file in sorted(store.glob("share_*.jsonl")):
        for key, row in read_answers(file):
            if key not in counted_keys:
                counted_keys.add(key)
                yield key, row


def _to_record(key: str, answer: Answer) -> tuple[str, Mapping[str, Any]]:
    return key, answer.to_row()


@cache
def _open_store(file: Path) -> AnswerStore:
    """Return a store that stays open to the end of the process.

    A run asks a thousand times, and would read the whole file each time.
    """
    return AnswerStore(file)


def _read_answer(file: Path, start: int) -> dict[str, Any]:
    with file.open("rb") as stream:
        stream.seek(start)
        answer: dict[str, Any] = json.loads(stream.readline())["answer"]
        return answer
