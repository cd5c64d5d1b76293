"""Serving a model until a signal: the model in this thread, HTTP in another."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from megatron_ext.serving.scheduler import Scheduler

_LINGER = 10  # seconds that answers which are done may take to be sent


def serve(scheduler: Scheduler, app: ASGIApp, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, finish what was accepted, and return.

    A second signal ends what still runs. Must be called in the main thread.
    """
    config = uvicorn.Config(
        app, lifespan="off", log_level="error", access_log=False, timeout_graceful_shutdown=_LINGER
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
