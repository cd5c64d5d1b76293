"""Asynchronous rollouts: servers sample the next step during the judging and training of this one.

A thread calls the servers and writes each response to the folder of the next step, which reads it
there. The thread calls no collective. The servers load the weights before the thread starts, and
again only after it has ended.
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
    """Sampler of the next step's responses. All ranks make the same calls, each for its share."""

    def __init__(self, served: VLLMRollouts, steps: int) -> None:
        """Make a sampler.

        Args:
            served: Servers that sample. Nothing else may call them between `start` and `join`.
            steps: Steps of the run, after which nothing is sampled.
        """
        self.served, self.steps = served, steps
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._problem: str | None = None

    def start(
        self,
        step: int,
        folder: Path,
        requests: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
    ) -> None:
        """Send the present weights to the servers and sample missing responses; a collective.

        Args:
            step: Step that the responses are for.
            folder: Folder of its rollouts.
            requests: Responses of this share: task, number in the group, prompt and seed.
            sampling: How responses are sampled.

        Raises:
            UserError: A server does not load the weights.
        """
        assert self._thread is None, "the previous step has not been joined"
        if step >= self.steps:
            return
        self.served.refresh()
        if not self.served.calls_server:
            return
        stored = read_share(folder, self.served.engine)
        missing = [one for one in requests if f"rollout:{one[0]}:{one[1]}" not in stored]
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._work,
            args=(folder, missing, sampling, self.served.engine.step),
            name=f"rollouts of step {step}",
            daemon=True,
        )
        self._thread.start()

    def join(self, check: Callable[[], None]) -> None:
        """Wait for the responses; a collective, after which all ranks can read all files.

        Args:
            check: Function that all ranks call from time to time. It may raise on all of them.

        Raises:
            UserError: A server does not answer in time, or refuses.
        """
        while all_reduce_max(int(self._thread is not None and self._thread.is_alive())):
            check()
            if self._thread is not None:
                self._thread.join(0.2)
        self._thread = None
        problem, self._problem = self._problem, None
        if message := next(
            (p for p in all_gather_by_data_rank(self.served.engine, problem) if p), None
        ):
            raise UserError(message)

    def cancel(self) -> None:
        """Stop sampling without a collective; responses that have arrived remain stored."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _work(
        self,
        folder: Path,
        requests: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
        version: int,
    ) -> None:
        try:
            with AnswerStore(share_file(folder, "ahead", self.served.engine)) as store:
                asyncio.run(self._until_stopped(self._draw(store, requests, sampling, version)))
        except UserError as error:
            self._problem = str(error)
        except Exception as error:
            # `join` reports the error on all ranks.
            self._problem = f"Asynchronous rollouts failed: {type(error).__name__}: {error}"

    async def _draw(
        self,
        store: AnswerStore,
        requests: Sequence[tuple[str, int, Sequence[int], int]],
        sampling: Sampling,
        version: int,
    ) -> None:
        """Sample responses and store each one when it arrives."""

        def to_record(place: int, response: GeneratedResponse) -> tuple[str, Mapping[str, Any]]:
            task, sample = requests[place][:2]
            fields = (response.tokens, response.log_probs, response.ended, version)
            return rollout_record(Rollout(task, sample, *fields))

        prompts, seeds = [one[2] for one in requests], [one[3] for one in requests]
        await self.served.ask(prompts, sampling, seeds, store, to_record)

    async def _until_stopped(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        while not task.done():
            if self._stop.is_set():
                task.cancel()
            await asyncio.wait([task], timeout=0.1)
        if not task.cancelled():
            task.result()
