"""A judge of a policy in training that is asked at an address."""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.commands.judge_flags import KEY
from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.client import CallFailed, Client, Request, Sampling, connect
from alignment.endpoints.rate_limits import Pace
from alignment.endpoints.write_buffer import WriteBuffer
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.annotation import key_of
from alignment.judges.endpoint_annotator import api_key
from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.judge_spec import JudgeSpec
from alignment.judges.questions import Judging, Question
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from alignment.records import Verdict
from alignment.rounding import EXACT, SINGLE
from megatron_ext.errors import UserError


class EndpointJudge:
    """Asks an address. One rank of each share of the data asks, and keeps what was answered."""

    def __init__(
        self, spec: JudgeSpec, pairwise: bool, policy: AlignmentEngine, store: Path
    ) -> None:
        """See the class."""
        source = f"the judge {spec.name}: template"
        judge_format = JudgeFormat.create(pairwise, spec.template, spec.thinking, source)
        self._spec, self._policy, self._store = spec, policy, store
        self._sampling = Sampling(
            spec.temperature, spec.max_new_tokens, spec.top_p, spec.top_k, spec.reasoning_effort
        )
        self._expected = spec.expected_score and not pairwise
        depends = [
            spec.model,
            spec.revision,
            asdict(self._sampling),
            judge_format.identity,
            self._expected,
        ]
        self.identity = sha256(json.dumps(depends).encode()).hexdigest()
        # The server's dtype is not known. Equal responses are one question, asked once.
        self.rounding_error = SINGLE if self._expected else EXACT
        self._task = Judging(judge_format, self.identity, self._expected)
        self._asks = is_share_leader(policy)
        self._reported: set[str] = set()
        self._file = store / f"share_{policy.data_rank:05d}.jsonl"

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """See the protocol. A call that failed in every try is a failed verdict."""
        check()
        rows: list[Any] = []
        problem = None
        try:
            found = run_async_while_polling(
                (lambda: self._ask(questions)) if self._asks else None, check
            )
            rows = [verdict.to_row() for verdict in found or []]
        except* UserError as group:  # nothing will ever be answered
            problem = f"the judge {self._spec.name}: {group.exceptions[0]}"
        except* OSError as group:
            problem = (
                f"the judge {self._spec.name} cannot keep its answers in {self._store}: "
                f"{group.exceptions[0]}"
            )
        shares = all_gather_by_data_rank(self._policy, (rows, problem))
        if told := next((problem for _, problem in shares if problem), None):
            raise UserError(told)
        return [Verdict.from_row(row) for row in shares[self._policy.data_rank][0]]

    async def _ask(self, questions: Sequence[Question]) -> list[Verdict]:
        requests = [
            Request(
                self._spec.model,
                self._task.messages(question),
                self._sampling,
                self._spec.revision,
                question.sample,
                self._expected,
            )
            for question in questions
        ]
        keys = [key_of(request) for request in requests]
        failed: dict[str, str] = {}
        store = _store_at(self._file)
        lacking = {k: r for k, r in zip(keys, requests) if k not in store}
        known = [key for key in lacking if key in self._elsewhere]
        if known:
            rows = [(key, _answer_at(*self._elsewhere[key])) for key in known]
            await asyncio.to_thread(store.add, rows)
        answers = {key: Answer.from_row(store[key]) for key in keys if key in store}
        for answer in answers.values():
            self._check(answer)
        slots = asyncio.Semaphore(self._spec.rows)
        async with connect(api_key(KEY), self._spec.rows) as http, WriteBuffer(store) as buffer:
            client = Client(
                self._spec.url.rstrip("/"), http, Pace(None, None),
                timeout=self._spec.timeout, tries=self._spec.tries,
                first_wait=self._spec.first_wait, max_wait=self._spec.max_wait,
                report=self._report,
            )  # fmt: skip

            async def one(key: str, request: Request) -> None:
                async with slots:
                    try:
                        answer = await client.ask(request)
                    except CallFailed as error:
                        failed[key] = str(error)
                    else:
                        await buffer.add(key, answer.to_row())
                        self._check(answer)
                        answers[key] = answer

            async with asyncio.TaskGroup() as tasks:
                for key, request in lacking.items():
                    if key not in answers:
                        tasks.create_task(one(key, request))
        return [
            self._task.record(question, answers.get(key), failed.get(key, ""))
            for question, key in zip(questions, keys)
        ]

    def _report(self, message: str) -> None:
        """Show a sentence once, however often the judge is asked."""
        if message not in self._reported:
            self._reported.add(message)
            print(f"the judge {self._spec.name}: {message}", file=sys.stderr, flush=True)

    def _check(self, answer: Answer) -> None:
        """Raise a UserError if no answer of this endpoint can give what is to be read from it."""
        if problem := self._task.lacks_log_probs(answer):
            raise UserError(
                "its endpoint gives no log-probabilities that can be used, and its score is their "
                f"expectation ({problem}): write expected_score: false in its file, or ask another "
                "server"
            )

    @cached_property
    def _elsewhere(self) -> dict[str, tuple[Path, int]]:
        """Where answers begin in the files of other shares: of a run that goes on with another
        number of ranks, questions are of another share than before."""
        found: dict[str, tuple[Path, int]] = {}
        for file in sorted(self._store.glob("share_*.jsonl")):
            if file == self._file:
                continue
            start = 0
            with file.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):  # else torn, or just being written by its rank
                        found[json.loads(line)["key"]] = (file, start)
                    start += len(line)
        return found


@cache
def _store_at(file: Path) -> AnswerStore:
    """Open to the end of the process: a run asks a thousand times, and would read all each time."""
    return AnswerStore(file)


def _answer_at(file: Path, start: int) -> dict[str, Any]:
    with file.open("rb") as stream:
        stream.seek(start)
        answer: dict[str, Any] = json.loads(stream.readline())["answer"]
        return answer
