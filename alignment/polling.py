"""Work of some ranks that the others wait for, hearing signals meanwhile."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from alignment.ranks import all_reduce_max

_OFTEN = 0.2  # seconds between looks at signals


def run_async_while_polling[T](
    work: Callable[[], Coroutine[Any, Any, T]] | None, check: Callable[[], None]
) -> T | None:
    """What this rank's work gives; a collective, in which ranks without work wait for the others.

    The work is done in a thread. Ranks wait for it in many short collectives: one as long as the
    work would run into the timeout of the process group.

    Args:
        work: of this rank, if it has any; makes no collective.
        check: called on all ranks now and then; may raise, on all of them, which cancels the work.

    Raises:
        Exception: what the work raises, on its rank alone.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, _until_stopped(work(), stop)) if work else None
        try:
            while all_reduce_max(int(done is not None and not done.done())):
                check()
                wait([done] if done else [], _OFTEN)
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
