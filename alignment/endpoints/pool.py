"""Concurrent requests to an endpoint, each answered once and stored on arrival.

A run that ends early does so in one way, whatever the cause: no further call is begun, the calls in
progress are awaited if they are paid for, and their answers are stored.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.client import CallFailed, RunCancelled
from alignment.endpoints.write_buffer import WriteBuffer


class CancelToken:
    """State of a run that may be cancelled, shared by all of its calls.

    Attributes:
        error: The error that cancelled the run; None after a signal.
        signal: The number of the signal that cancelled the run, or 0.
    """

    def __init__(self) -> None:
        """Create the token of a run that is not cancelled; needs a running event loop."""
        self._event = asyncio.Event()
        self.error: Exception | None = None
        self.signal = 0

    @property
    def cancelled(self) -> bool:
        """Return whether the run is cancelled."""
        return self._event.is_set()

    def cancel(self, error: Exception | None = None, signal_number: int = 0) -> None:
        """Cancel the run, unless it is already cancelled; only the first cause counts."""
        if not self.cancelled:
            self.error, self.signal = error, signal_number
            self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds, or raise `RunCancelled` as soon as the run is cancelled."""
        if self.cancelled:
            raise RunCancelled
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise RunCancelled


def raise_failure(request: Any, error: CallFailed) -> None:
    """Raise the failure of a call, which ends the run."""
    raise error


@dataclass
class EndpointPool[Request, Answer]:
    """Pool of concurrent calls of an endpoint, with a durable store for the answers.

    Attributes:
        call: Function that makes one call, with its retries.
        to_record: Function that returns the key and the row of an answer in the store.
        concurrency: Maximum number of concurrent calls.
        cancel: The cancellation of the run.
        await_calls: Whether calls in progress are awaited when an error ends the run, because they
            are paid for.
    """

    call: Callable[[Request], Awaitable[Answer]]
    to_record: Callable[[Request, Answer], tuple[str, Mapping[str, Any]]]
    concurrency: int = 32
    cancel: CancelToken = field(default_factory=CancelToken)
    await_calls: bool = True
    _workers: list["asyncio.Task[None]"] = field(default_factory=list, init=False)

    async def ask_many(
        self,
        requests: Sequence[Request],
        store: AnswerStore | None = None,
        on_answer: Callable[[Request, Answer], None] = lambda request, answer: None,
        on_failure: Callable[[Request, CallFailed], None] = raise_failure,
    ) -> None:
        """Make all calls, and return when every request has an answer or a failure.

        Args:
            requests: The requests, each of which is called once.
            store: The store to which answers are written, outside of the event loop.
            on_answer: Function that receives each answer once it is on the disk. An error that it
                raises ends the run.
            on_failure: Function that receives each failed call. An error that it raises ends the
                run. Default: every failure ends it.

        Raises:
            Exception: The first error that ended the run.
        """
        remaining = iter(requests)
        async with AsyncExitStack() as stack:
            buffer = None
            if store is not None:
                buffer = await stack.enter_async_context(WriteBuffer(store))
            self._workers = [
                asyncio.create_task(self._work(remaining, buffer, on_answer, on_failure))
                for _ in range(min(self.concurrency, len(requests)))
            ]
            try:
                await asyncio.gather(*self._workers)
            except asyncio.CancelledError:
                if not self.cancel.cancelled:
                    raise
            finally:
                self.drop_calls()
                await asyncio.gather(*self._workers, return_exceptions=True)
        if self.cancel.error is not None:
            raise self.cancel.error

    def drop_calls(self) -> None:
        """Cancel the calls in progress."""
        for worker in self._workers:
            worker.cancel()

    async def _work(
        self,
        remaining: Iterator[Request],
        buffer: WriteBuffer | None,
        on_answer: Callable[[Request, Answer], None],
        on_failure: Callable[[Request, CallFailed], None],
    ) -> None:
        for request in remaining:
            if self.cancel.cancelled:
                return
            try:
                try:
                    answer = await self.call(request)
                except CallFailed as error:
                    on_failure(request, error)
                    continue
                if buffer is not None:
                    await buffer.add(*self.to_record(request, answer))
                on_answer(request, answer)
            except RunCancelled:
                return
            except Exception as error:
                self.cancel.cancel(error)
                if not self.await_calls:
                    self.drop_calls()
                return
