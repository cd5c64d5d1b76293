"""The responses of the next step, drawn by servers while this step is judged and trained on.

A thread asks the servers and writes each response down as it comes, into the next step's folder,
where that step finds it. The thread makes no collective; the weights are handed over before it
starts, and not again before it has ended.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import AnswerStore
from alignment.engines.protocol import GeneratedResponse
from alignment.ranks import all_gather_by_data_rank, all_reduce_max
from alignment.rl.rollouts import Rollout, read_share, rollout_record, share_file
from alignment.rl.vllm_rollouts import VLLMRollouts
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling


class AsyncRollouts:
    """Draws one step ahead. Ranks make the same calls, each about its own share."""

    def __init__(self, served: VLLMRollouts, steps: int) -> None:
        """See the class.

        Args:
            served: who draws; nobody else may ask it between `start` and `join`.
            steps: of the run, beyond which nothing is drawn.
        """
        self.served, self.steps = served, steps
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._problem: str | None = None

    def start(
        self,
        step: int,
        folder: Path,
        wanted: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
    ) -> None:
        """Hand the present weights over and draw what is not there yet; a collective.

        Args:
            step: whose responses they are.
            folder: of its rollouts.
            wanted: this share's: task, sample of it, prompt and seed.

        Raises:
            UserError: a server does not take the weights.
        """
        assert self._thread is None, "what was begun has not been joined"
        if step >= self.steps:
            return
        self.served.refresh()
        if not self.served.asks:
            return
        known = read_share(folder, self.served.engine)
        missing = [one for one in wanted if f"rollout:{one[0]}:{one[1]}" not in known]
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._work,
            args=(folder, missing, sampling, self.served.engine.step),
            name=f"rollouts of step {step}",
            daemon=True,
        )
        self._thread.start()

    def join(self, check: Callable[[], None]) -> None:
        """Wait for what was begun; a collective, after which all ranks see all files.

        Args:
            check: called on all ranks now and then; may raise.

        Raises:
            UserError: a server does not answer within its patience, or refuses.
        """
        while all_reduce_max(int(self._thread is not None and self._thread.is_alive())):
            check()
            if self._thread is not None:
                self._thread.join(0.2)
        self._thread = None
        problem, self._problem = self._problem, None
        if told := next(
            (p for p in all_gather_by_data_rank(self.served.engine, problem) if p), None
        ):
            raise UserError(told)

    def cancel(self) -> None:
        """Give up what was begun; what has come is kept. No collective."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _work(
        self,
        folder: Path,
        wanted: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
        version: int,
    ) -> None:
        try:
            with AnswerStore(share_file(folder, "ahead", self.served.engine)) as store:
                asyncio.run(self._until_stopped(self._draw(store, wanted, sampling, version)))
        except UserError as error:
            self._problem = str(error)
        except Exception as error:
            # A thread's error is seen by nobody unless the ranks are told of it.
            self._problem = f"rollouts ahead of their step failed: {type(error).__name__}: {error}"

    async def _draw(
        self,
        store: AnswerStore,
        wanted: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
        version: int,
    ) -> None:
        """Draw responses, each stored as it comes."""

        def to_record(place: int, response: GeneratedResponse) -> tuple[str, Mapping[str, Any]]:
            task, sample = wanted[place][:2]
            fields = (response.tokens, response.log_probs, response.ended, version)
            return rollout_record(Rollout(task, sample, *fields))

        prompts, seeds = [one[2] for one in wanted], [one[3] for one in wanted]
        await self.served.ask(prompts, sampling, seeds, store, to_record)

    async def _until_stopped(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        while not task.done():
            if self._stop.is_set():
                task.cancel()
            await asyncio.wait([task], timeout=0.1)
        if not task.cancelled():
            task.result()
