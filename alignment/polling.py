"""Asynchronous work of some ranks, for which the others wait while they check for signals."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from alignment.ranks import all_reduce_max

_INTERVAL = 0.2  # seconds between checks


def run_async_while_polling[T](
    work: Callable[[], Coroutine[Any, Any, T]] | None,
    check: Callable[[], None],
    meanwhile: Callable[[], None] | None = None,
) -> T | None:
    """Return the result of this rank's work; a collective, in which ranks without work wait.

    The work runs in a thread. Ranks wait for it in many short collectives, as a single one of that
    length would run into the timeout of the process group.

    Args:
        work: Work of this rank, without collectives. None if it has none.
        check: Function that all ranks call from time to time. It may raise on all of them, which
            cancels the work.
        meanwhile: Function that all ranks call while the work is under way, before they wait.

    Raises:
        Exception: An error of the work, on its rank alone.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, _until_stopped(work(), stop)) if work else None
        try:
            if meanwhile is not None:
                meanwhile()
            while all_reduce_max(int(done is not None and not done.done())):
                check()
                wait([done] if done else [], _INTERVAL)
        finally:
            stop.set()  # the end of the block waits for the thread
    return done.result() if done else None


async def _until_stopped[T](work: Coroutine[Any, Any, T], stop: threading.Event) -> T:
    task = asyncio.create_task(work)
    while not task.done():
        if stop.is_set():
            task.cancel()
        await asyncio.wait([task], timeout=0.1)
    return task.result()
