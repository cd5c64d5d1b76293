"""Buffer of answers that are written to the disk outside of the event loop."""

import asyncio
from collections.abc import Mapping
from typing import Any

from alignment.endpoints.answer_store import AnswerStore


class WriteBuffer:
    """Buffer of answers for a store, shared by the calls of one event loop.

    Syncing a write to the disk takes milliseconds, or much longer on a network file system. On the
    event loop it would block all calls. Answers that arrive while the disk
    is busy are written together. Leaving the context waits until all answers are written.
    """

    def __init__(self, store: AnswerStore) -> None:
        """Create an empty buffer.

        Args:
            store: The store, to which nothing else may write meanwhile.
        """
        self._store = store
        self._queue: asyncio.Queue[tuple[str, Mapping[str, Any], asyncio.Future[None]]] = (
            asyncio.Queue()
        )

    async def __aenter__(self) -> "WriteBuffer":
        """Start the writer."""
        self._writer = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait until every answer is written, and stop the writer."""
        await self._queue.join()
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    async def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Add an answer, and return when it is on the disk.

        Args:
            key: The key of the answer.
            answer: The answer as plain values.

        Raises:
            OSError: If the answer cannot be written.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((key, answer, done))
        await asyncio.shield(done)

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await asyncio.to_thread(self._store.add, [(key, row) for key, row, _ in batch])
            except Exception as error:
                for _, _, done in batch:
                    done.set_exception(error)
                    done.exception()  # marks it as retrieved if the caller was cancelled
            else:
                for _, _, done in batch:
                    done.set_result(None)
            for _ in batch:
                self._queue.task_done()
