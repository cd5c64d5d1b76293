"""Many questions asked at a time, each answered once and kept, until all are or something ends it.

There is one way to end early, whatever the cause: no call is begun any more, the calls under way
are waited for, because they are paid for, and their answers are kept.
"""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.client import CallFailed, Client, Request, Stopped
from alignment.endpoints.usage import Used
from alignment.endpoints.write_buffer import WriteBuffer
from alignment.judges.formats.answers import Answer
from alignment.judges.results import commonest, require_results
from megatron_ext.errors import TooFewResults
from megatron_ext.progress import Progress

# Failures are a share of the questions that are done with, or of so many where fewer are: two
# failures among the first three calls say little.
_LEAST_DONE = 100
# So many answers without a result are asked for before a run that cannot succeed is ended: of a
# small one all are, and their reasons can be read in its output.
_LEAST_LACKING = 20
# So many calls in a row that failed in every try, and the endpoint is taken for dead.
_DEAD = 20


def key_of(request: Request) -> str:
    """A hash of everything that the answer depends on; where it is asked does not count."""
    return sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()


class Ending:
    """Whether the run is to end, and why.

    Attributes:
        error: what ended it; None after a signal.
        signal: the number of the signal that ended it, or 0.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.error: Exception | None = None
        self.signal = 0

    @property
    def begun(self) -> bool:
        return self._event.is_set()

    def begin(self, error: Exception | None = None, signal_number: int = 0) -> None:
        """The first cause stays."""
        if not self.begun:
            self.error, self.signal = error, signal_number
            self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Wait, or raise `Stopped` as soon as the run is to end."""
        if self.begun:
            raise Stopped
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


@dataclass
class Tally:
    """What came of the questions of this run.

    Attributes:
        failed: why a question has no answer, by its key.
        lacking: why an answer gives no result, by its key; also of answers from before the run.
        notes: of answers, counted by what `seen` said of them.
    """

    used: Used = field(default_factory=Used)
    failed: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        return self.used.answers + len(self.failed)


@dataclass
class Asking:
    """A run over questions.

    Attributes:
        todo: keys of the questions, each once.
        request: makes the request of a key.
        seen: looks at an answer that has been kept; says in a word what is wrong with it, or
            nothing; may raise a UserError, which ends the run.
        lack: says in a sentence why an answer gives no result, or nothing where it gives one.
        before: how many questions had their answers before the run.
        max_failed: the share of questions that may end without a result.
        describe: what the progress says besides counts.
    """

    todo: Sequence[str]
    request: Callable[[str], Request]
    store: AnswerStore
    client: Client
    ending: Ending
    seen: Callable[[str, Answer], str] = lambda key, answer: ""
    lack: Callable[[str, Answer], str] = lambda key, answer: ""
    before: int = 0
    concurrency: int = 32
    max_failed: float = 0.05
    describe: Callable[[Tally], str] = lambda tally: ""
    tally: Tally = field(default_factory=Tally, init=False)
    _in_a_row: int = field(default=0, init=False)

    async def run(self, progress: Progress) -> Tally:
        """Ask.

        Raises:
            UserError: no question can be answered.
            TooFewResults: too many questions have no result.
            OSError: an answer could not be kept.
            Stopped: a signal came; its number is the argument.
        """
        left = iter(self.todo)
        async with WriteBuffer(self.store) as buffer:
            watching = asyncio.create_task(self._show(progress))
            workers = [
                asyncio.create_task(self._work(left, buffer))
                for _ in range(min(self.concurrency, len(self.todo)))
            ]
            try:
                with self._signals(workers, progress):
                    await asyncio.gather(*workers)
            except asyncio.CancelledError:
                if not self.ending.begun:
                    raise
            finally:
                for task in (*workers, watching):
                    task.cancel()
                await asyncio.gather(*workers, watching, return_exceptions=True)
        progress.update(self.tally.ended, self._note())
        if self.ending.error is not None:
            raise self.ending.error
        if self.ending.begun:
            raise Stopped(self.ending.signal)
        return self.tally

    async def _work(self, left: Iterator[str], buffer: WriteBuffer) -> None:
        for key in left:
            if self.ending.begun:
                return
            try:
                answer = await self.client.ask(self.request(key))
                self._in_a_row = 0  # before it is kept: a slow disk is no sign of life
                await buffer.add(key, answer.to_row())
                self.tally.used += Used.of(answer)
                if note := self.seen(key, answer):
                    self.tally.notes[note] = self.tally.notes.get(note, 0) + 1
                if reason := self.lack(key, answer):
                    self.tally.lacking[key] = reason
                    self._check_failures()
            except CallFailed as error:
                self.tally.failed[key] = str(error)
                self._in_a_row = 0 if error.refused else self._in_a_row + 1
                self._check_failures()
            except Stopped:
                return
            except Exception as error:
                self.ending.begin(error)
                return

    def _check_failures(self) -> None:
        """End the run as soon as it cannot succeed, or its endpoint seems to be dead."""
        failed, total = self.tally.failed, self.before + len(self.todo)
        done = self.before + self.tally.ended
        out_of = max(done, min(_LEAST_DONE, total))
        why = ""
        if failed and len(failed) / out_of > self.max_failed:
            why = (
                f"{len(failed)} of {done} questions failed, more than --max-failed "
                f"{self.max_failed:g}"
            )
        elif self._in_a_row >= max(_DEAD, self.concurrency):
            why = f"{self._in_a_row} calls in a row failed in every try"
        if why:
            often = f"most often: {commonest(failed.values())}"
            advice = "fix the endpoint and repeat the command, which keeps its answers"
            self.ending.begin(TooFewResults(f"{why}; {often}: {advice}"))
        reasons = [*failed.values(), *self.tally.lacking.values()]
        if len(reasons) < _LEAST_LACKING:
            return
        try:
            require_results(reasons, total, self.max_failed)
        except TooFewResults as error:
            self.ending.begin(error)

    def _note(self) -> str:
        repeated = f"{self.client.retried:,} tries repeated, the last for {self.client.last_fault}"
        waits = [repeated] if self.client.retried else []
        failed = [f"{len(self.tally.failed):,} failed"] if self.tally.failed else []
        notes = [f"{count:,} {note}" for note, count in sorted(self.tally.notes.items())]
        parts = [self.describe(self.tally), *failed, *notes, *waits, self.client.pace.waiting]
        return ", ".join(filter(None, parts))

    async def _show(self, progress: Progress) -> None:
        while True:
            progress.update(self.tally.ended, self._note())
            await asyncio.sleep(0.5)

    @contextmanager
    def _signals(
        self, workers: Sequence["asyncio.Task[None]"], progress: Progress
    ) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run in order, the second drops calls under way."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.ending.begun:
                for worker in workers:
                    worker.cancel()
                return
            self.ending.begin(signal_number=number)
            progress.log("stopping when the calls under way are answered; again to drop them")

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
