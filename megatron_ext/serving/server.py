"""Server process: the model runs in the main thread, HTTP in another."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from megatron_ext.serving.scheduler import Scheduler

_SHUTDOWN_SECONDS = 10  # time in which finished responses are sent


def serve(scheduler: Scheduler, app: ASGIApp, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, finish the accepted requests, and return.

    A second signal aborts them. Call it in the main thread.

    Args:
        scheduler: Scheduler that runs the model in this thread.
        app: Application, which runs in another thread.
        listening: Socket of the server.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, args=([listening],), name="http")
    with _closed_by_signals(scheduler):
        thread.start()
        try:
            scheduler.run()
        finally:
            http.should_exit = True
            thread.join()


@contextmanager
def _closed_by_signals(scheduler: Scheduler) -> Iterator[None]:
    def close(number: int, frame: FrameType | None) -> None:
        scheduler.close(at_once=scheduler.closing)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, close) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
