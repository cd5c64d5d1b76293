"""Who waits, who runs: continuations from any thread, passes of the model in one."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from megatron_ext.serving.replicas import GenerationRequest, ModelReplicas, PassPlan, TokenEvent

_HEARTBEAT = 30.0  # seconds; other ranks give up on a leader that is silent for minutes


class QueueFull(Exception):
    """As many continuations wait as may."""


class Closing(Exception):
    """The server is about to end."""


class Job:
    """A continuation on its way.

    Attributes:
        work: what to do.
        deliver: called with each token in the scheduler's thread, and with None if it can get no
            more because the scheduler failed or was told to end at once.
    """

    def __init__(
        self, work: GenerationRequest, deliver: Callable[[TokenEvent | None], None]
    ) -> None:
        self.work, self.deliver = work, deliver
        self.cancelled = False
        self.number, self.copy = -1, -1


class Scheduler:
    """Admits waiting jobs into free rows between passes, first come first served."""

    def __init__(self, replicas: ModelReplicas, most_waiting: int) -> None:
        self._replicas, self.most_waiting = replicas, most_waiting
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        # Unlike a condition's, its `put` may be called in a signal handler.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closing = self._at_once = False
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Jobs that no row is free for."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have a row."""
        return len(self._running)

    @property
    def closing(self) -> bool:
        """Whether new jobs are refused."""
        return self._closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none. From any thread.

        Raises:
            QueueFull: they are more than may wait and rows are free.
            Closing: `close` was called.
        """
        with self._lock:
            if self._closing:
                raise Closing
            free = self._replicas.max_slots * self._replicas.count - len(self._running)
            if len(self._waiting) + len(jobs) > self.most_waiting + free:
                raise QueueFull
            self._waiting.extend(jobs)
        self._wake.put(None)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs; their rows are free before the next pass. From any thread."""
        for job in jobs:
            job.cancelled = True
        self._wake.put(None)

    def close(self, at_once: bool = False) -> None:
        """Refuse new jobs, and let `run` return when those it has are done, or at once.

        May be called in a signal handler.
        """
        self._at_once = self._at_once or at_once
        self._closing = True
        self._wake.put(None)

    def run(self) -> None:
        """Run passes until closed and done. Belongs to the thread that owns the model."""
        try:
            last = False
            while not last:
                plan = self._plan()
                for number, piece in self._replicas.run(plan):
                    job = self._running[number]
                    if piece.finish is not None:
                        with self._lock:
                            del self._running[number]
                    job.deliver(piece)
                last = plan.last
        finally:
            self._closing = True
            with self._lock:
                left = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for job in left:
                job.deliver(None)

    def _plan(self) -> PassPlan:
        """The next pass; waits for one while there is nothing to do."""
        while not self._wake.empty():  # what they announced is seen below
            self._wake.get_nowait()
        plan = self._admit()
        if plan.running or plan.leaving or plan.last:
            return plan
        try:
            self._wake.get(timeout=_HEARTBEAT)
        except queue.Empty:
            pass
        return self._admit()

    def _admit(self) -> PassPlan:
        joining, leaving = [], []
        with self._lock:
            for number, job in list(self._running.items()):
                if job.cancelled:
                    leaving.append(number)
                    del self._running[number]
            load = [0] * self._replicas.count
            for job in self._running.values():
                load[job.copy] += 1
            while self._waiting and min(load) < self._replicas.max_slots:
                job = self._waiting.popleft()
                if job.cancelled:
                    continue
                job.number, job.copy = next(self._numbers), load.index(min(load))
                load[job.copy] += 1
                self._running[job.number] = job
                joining.append((job.number, job.copy, job.work))
            done = self._closing and not self._running and not self._waiting
            return PassPlan(joining, leaving, bool(self._running), done or self._at_once)
