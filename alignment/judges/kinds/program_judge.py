"""Judge that is a program, such as a rule or a function, called by the ranks of a training run."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from alignment.judges.questions import Question
from alignment.records import Pair, Prompt, Response, Verdict
from alignment.rounding import EXACT
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.engines.protocol import AlignmentEngine


class Program(Protocol):
    """Program that judges one item at a time.

    A program may have an attribute `parallel`, the number of items that it judges concurrently in
    threads; the default is 1.

    Attributes:
        identity: A hash of everything that a verdict depends on.
    """

    @property
    def identity(self) -> str:
        """Return a hash of everything that a verdict depends on."""
        ...

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """Return the verdict on an item."""
        ...


class ProgramJudge:
    """Judge that asks a program, whose scores are exact.

    A program judges one response at a time, so that its score does not depend on a batch. Even
    small differences between scores are therefore real differences between responses.

    A function may return different scores for the same response. With an engine, one rank of each
    share of the data calls it, so that ranks that share a model train on the same rewards.
    """

    rounding_error = EXACT

    def __init__(self, program: Program, engine: "AlignmentEngine | None" = None) -> None:
        """Create the judge.

        Args:
            program: The rule or the function.
            engine: The engine whose ranks share the verdicts, or None if each rank calls the
            program.
        """
        self.program, self._engine, self.identity = program, engine, program.identity
        self._asks = True
        parallel = getattr(program, "parallel", 1)
        self.batch_size = 4 * parallel if parallel > 1 else 1
        if engine is not None:
            from alignment.ranks import is_share_leader

            self._asks = is_share_leader(engine)

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Return the verdicts on questions; see `Judge`."""
        if self._engine is None and self.batch_size > 1:
            return asyncio.run(self._verdicts(questions))
        if self._engine is None:
            return [self._verdict(question) for question in questions]
        from alignment.polling import run_async_while_polling
        from alignment.ranks import all_gather_by_data_rank

        verdicts: list[Verdict] | None = None
        problem = None
        try:
            # A function may be slow, so that the other ranks poll for signals while they wait.
            work = partial(self._verdicts, questions) if self._asks else None
            verdicts = run_async_while_polling(work, check)
        except UserError as error:
            problem = str(error)
        rows = [verdict.to_row() for verdict in verdicts or ()]
        shares = all_gather_by_data_rank(self._engine, (rows, problem))
        if message := next((problem for _, problem in shares if problem), None):
            raise UserError(message)
        return [Verdict.from_row(row) for row in shares[self._engine.data_rank][0]]

    def close(self) -> None:
        """Release the resources of the program."""
        if close := getattr(self.program, "close", None):
            close()

    async def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        parallel = getattr(self.program, "parallel", 1)
        if parallel == 1:  # an error ends the round before the next item is begun
            return [await asyncio.to_thread(self._verdict, question) for question in questions]
        slots = asyncio.Semaphore(parallel)

        async def verdict(question: Question) -> Verdict:
            async with slots:
                return await asyncio.to_thread(self._verdict, question)

        return list(await asyncio.gather(*map(verdict, questions)))

    def _verdict(self, question: Question) -> Verdict:
        assert not isinstance(question.item, Prompt)
        return self.program.verdict(question.item, question.swapped, question.sample)
