"""Scheduler of continuations: a queue filled by any thread, and one thread that runs the model."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from megatron_ext.serving.replicas import GenerationRequest, ModelReplicas, PassPlan, TokenEvent

_HEARTBEAT = 30.0  # seconds; collectives of other ranks time out after minutes without a pass


class QueueFull(Exception):
    """Error of a request that exceeds the maximum number of waiting jobs."""


class Closing(Exception):
    """Error of a request that arrives while the server is shutting down."""


class Job:
    """Continuation that is waiting or running.

    Attributes:
        request: The continuation to generate.
        deliver: Callback that receives each token event in the scheduler's thread, and None if the
            scheduler stops before the continuation is finished.
    """

    def __init__(
        self, request: GenerationRequest, deliver: Callable[[TokenEvent | None], None]
    ) -> None:
        self.request, self.deliver = request, deliver
        self.cancelled = False
        self.number, self.replica = -1, -1


class Scheduler:
    """First-in-first-out scheduler that admits waiting jobs into free slots between passes."""

    def __init__(self, replicas: ModelReplicas, max_waiting: int) -> None:
        self._replicas, self.max_waiting = replicas, max_waiting
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        # Unlike a condition's, its `put` may be called in a signal handler.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closing = self._at_once = False
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs that have a slot."""
        return len(self._running)

    @property
    def closing(self) -> bool:
        """Whether new jobs are refused."""
        return self._closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs of one request, or none of them. Any thread may call it.

        Raises:
            QueueFull: The jobs exceed the free slots and the free places in the queue.
            Closing: `close` has been called.
        """
        with self._lock:
            if self._closing:
                raise Closing
            free = self._replicas.max_slots * self._replicas.count - len(self._running)
            if len(self._waiting) + len(jobs) > self.max_waiting + free:
                raise QueueFull
            self._waiting.extend(jobs)
        self._wake.put(None)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs and free their slots before the next pass. Any thread may call it.

        Their places in the queue are free at once.
        """
        for job in jobs:
            job.cancelled = True
        with self._lock:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._wake.put(None)

    def close(self, at_once: bool = False) -> None:
        """Refuse new jobs and make `run` return. Signal handlers may call it.

        Args:
            at_once: Whether accepted jobs are aborted instead of finished.
        """
        self._at_once = self._at_once or at_once
        self._closing = True
        self._wake.put(None)

    def run(self) -> None:
        """Run passes until the scheduler is closed and its jobs are finished.

        Call it in the thread that owns the model.
        """
        try:
            last = False
            while not last:
                plan = self._plan()
                for number, event in self._replicas.run(plan):
                    job = self._running[number]
                    if event.finish is not None:
                        with self._lock:
                            del self._running[number]
                    job.deliver(event)
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
        """Return the plan of the next pass, and wait for a job or the heartbeat without one."""
        while not self._wake.empty():  # _admit handles what these announced
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
                load[job.replica] += 1
            while self._waiting and min(load) < self._replicas.max_slots:
                job = self._waiting.popleft()
                if job.cancelled:
                    continue
                job.number, job.replica = next(self._numbers), load.index(min(load))
                load[job.replica] += 1
                self._running[job.number] = job
                joining.append((job.number, job.replica, job.request))
            done = self._closing and not self._running and not self._waiting
            return PassPlan(joining, leaving, bool(self._running), done or self._at_once)
