"""Answers written off the event loop, those that came while the disk was busy all at once."""

import asyncio
from collections.abc import Mapping
from typing import Any

from alignment.endpoints.answer_store import AnswerStore


class WriteBuffer:
    """Writer of answers to a store, for calls that share an event loop.

    A write is synced to the disk, which takes milliseconds, or many on a network file system. On
    the loop it would stop all calls meanwhile. Leaving the context waits for what was handed over.
    """

    def __init__(self, store: AnswerStore) -> None:
        self._store = store
        self._queue: asyncio.Queue[tuple[str, Mapping[str, Any], asyncio.Future[None]]] = (
            asyncio.Queue()
        )

    async def __aenter__(self) -> "WriteBuffer":
        self._writer = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._queue.join()
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    async def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Return when the answer is on the disk.

        Raises:
            OSError: it cannot be written.
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
                    done.exception()  # a caller that was cancelled does not look at it
            else:
                for _, _, done in batch:
                    done.set_result(None)
            for _ in batch:
                self._queue.task_done()
