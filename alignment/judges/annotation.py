"""Run of an annotation: progress, signals, and the failures that end it early."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.chat_client import ChatClient, ChatRequest
from alignment.endpoints.client import CallFailed, RunCancelled
from alignment.endpoints.pool import CancelToken, EndpointPool
from alignment.endpoints.usage import TokenUsage
from alignment.judges.formats.answers import Answer
from alignment.judges.results import commonest, require_results
from megatron_ext.errors import TooFewResults
from megatron_ext.progress import Progress

# Failures count as a share of the finished questions, or of this number if fewer are finished,
# because two failures among the first three calls mean little.
_LEAST_DONE = 100
# Number of answers without a result after which a run that cannot succeed is ended. A smaller run
# asks all of its questions, so that its output contains the reasons.
_LEAST_LACKING = 20
# Number of answers after which the cost estimate is revised, if it is twice the concurrency.
_FIRST = 20
# Number of consecutive failed calls after which the endpoint is considered unavailable.
_DEAD = 20


@dataclass
class AnnotationProgress:
    """Counts of the outcomes of the questions of a run.

    Attributes:
        usage: Token usage of the answers of this run.
        failed: Reason why a question has no answer, by its key.
        lacking: Reason why an answer gives no result, by its key, including earlier answers.
        notes: Number of answers by the note that `AnnotationRun.inspect` returned.
    """

    usage: TokenUsage = field(default_factory=TokenUsage)
    failed: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Return the number of questions that have an answer or a failure."""
        return self.usage.answers + len(self.failed)


@dataclass
class AnnotationRun:
    """Run that asks each of its questions once.

    Attributes:
        keys: Keys of the questions that have no answer yet.
        request: Function that makes the request of a key.
        store: The store of the answers.
        client: The client of the endpoint.
        cancel: The cancellation of the run; the client uses its `sleep`.
        inspect: Function that receives a stored answer, and returns its fault in a word or two, or
            "". A UserError that it raises ends the run.
        explain_lack: Function that returns the reason why an answer gives no result, or "".
        answered_before: Number of questions that had answers before the run.
        concurrency: Maximum number of concurrent calls.
        max_failed: Share of the questions that may end without a result.
        describe: Function that returns the text after the counts in the progress line.
        revise: Function that returns a revised estimate for all calls, as a sentence, from the
            usage and the duration in seconds of the first answers.
    """

    keys: Sequence[str]
    request: Callable[[str], ChatRequest]
    store: AnswerStore
    client: ChatClient
    cancel: CancelToken
    inspect: Callable[[str, Answer], str] = lambda key, answer: ""
    explain_lack: Callable[[str, Answer], str] = lambda key, answer: ""
    answered_before: int = 0
    concurrency: int = 32
    max_failed: float = 0.05
    describe: Callable[[AnnotationProgress], str] = lambda progress: ""
    revise: Callable[[TokenUsage, float], str] | None = None
    counts: AnnotationProgress = field(default_factory=AnnotationProgress, init=False)
    _failed_in_a_row: int = field(default=0, init=False)
    _progress: Progress | None = field(default=None, init=False)
    _begin: float = field(default=0.0, init=False)

    async def run(self, progress: Progress) -> AnnotationProgress:
        """Ask all questions.

        Raises:
            UserError: If no question can be answered.
            TooFewResults: If too many questions have no result.
            OSError: If an answer cannot be stored.
            RunCancelled: After a signal, whose number is the argument.
        """
        pool = EndpointPool(self._call, _to_record, self.concurrency, self.cancel)
        self._progress, self._begin = progress, time.monotonic()
        display = asyncio.create_task(self._show(progress))
        try:
            with self._signals(pool, progress):
                await pool.ask_many(self.keys, self.store, self._on_answer, self._on_failure)
        finally:
            display.cancel()
            await asyncio.gather(display, return_exceptions=True)
            progress.update(self.counts.done, self._note())
        if self.cancel.cancelled:
            raise RunCancelled(self.cancel.signal)
        return self.counts

    async def _call(self, key: str) -> Answer:
        answer = await self.client.ask(self.request(key))
        self._failed_in_a_row = 0  # before it is stored, so that a slow disk has no effect
        return answer

    def _on_answer(self, key: str, answer: Answer) -> None:
        self.counts.usage += TokenUsage.of(answer)
        # Short answers arrive first, so that the first answer of each worker is not representative.
        if self.revise and self.counts.usage.answers == max(_FIRST, 2 * self.concurrency):
            assert self._progress is not None
            seconds = time.monotonic() - self._begin
            self._progress.log(self.revise(self.counts.usage, seconds))
        if note := self.inspect(key, answer):
            self.counts.notes[note] = self.counts.notes.get(note, 0) + 1
        if reason := self.explain_lack(key, answer):
            self.counts.lacking[key] = reason
            self._check_failures()

    def _on_failure(self, key: str, error: CallFailed) -> None:
        self.counts.failed[key] = str(error)
        self._failed_in_a_row = 0 if error.refused else self._failed_in_a_row + 1
        self._check_failures()

    def _check_failures(self) -> None:
        """End the run if it cannot succeed or its endpoint seems to be unavailable."""
        failed, total = self.counts.failed, self.answered_before + len(self.keys)
        done = self.answered_before + self.counts.done
        out_of = max(done, min(_LEAST_DONE, total))
        problem = ""
        if failed and len(failed) / out_of > self.max_failed:
            problem = (
                f"{len(failed)} of {done} questions failed, more than --max-failed "
                f"{self.max_failed:g}"
            )
        elif self._failed_in_a_row >= max(_DEAD, self.concurrency):
            problem = f"{self._failed_in_a_row} consecutive calls failed in every attempt"
        if problem:
            often = f"most often: {commonest(failed.values())}"
            advice = "Fix the endpoint and repeat the command, which keeps its answers."
            self.cancel.cancel(TooFewResults(f"{problem}; {often}. {advice}"))
        reasons = [*failed.values(), *self.counts.lacking.values()]
        if len(reasons) < _LEAST_LACKING:
            return
        try:
            require_results(reasons, total, self.max_failed)
        except TooFewResults as error:
            self.cancel.cancel(error)

    def _note(self) -> str:
        repeated = (
            f"{self.client.retried:,} attempts repeated, the last for {self.client.last_fault}"
        )
        waits = [repeated] if self.client.retried else []
        failed = [f"{len(self.counts.failed):,} failed"] if self.counts.failed else []
        notes = [f"{count:,} {note}" for note, count in sorted(self.counts.notes.items())]
        waiting = self.client.limiter.waiting
        parts = [self.describe(self.counts), *failed, *notes, *waits, waiting]
        return ", ".join(filter(None, parts))

    async def _show(self, progress: Progress) -> None:
        while True:
            progress.update(self.counts.done, self._note())
            await asyncio.sleep(0.5)

    @contextmanager
    def _signals(self, pool: EndpointPool[str, Answer], progress: Progress) -> Iterator[None]:
        """Handle signals: the first SIGINT or SIGTERM ends the run in order, the second at once."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.cancel.cancelled:
                pool.drop_calls()
                return
            self.cancel.cancel(signal_number=number)
            progress.log("stopping when the calls in progress are answered; repeat to cancel them")

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def _to_record(key: str, answer: Answer) -> tuple[str, Mapping[str, Any]]:
    return key, answer.to_row()
