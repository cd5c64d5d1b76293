"""Test of the queue of the server, without a model."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.serving.replicas import GenerationRequest
from megatron_ext.serving.scheduler import Job, QueueFull, Scheduler


def test_waiting_jobs_that_are_cancelled_leave_the_queue_to_others() -> None:
    replicas: Any = SimpleNamespace(max_slots=1, count=1)
    request: Any = GenerationRequest([1], None, 0)  # type: ignore[arg-type]
    scheduler = Scheduler(replicas, max_waiting=2)
    running, *waiting, last = (Job(request, lambda event: None) for _ in range(4))
    scheduler.submit([running])
    scheduler._admit()
    scheduler.submit(waiting)
    with pytest.raises(QueueFull):
        scheduler.submit([last])
    scheduler.cancel(waiting)
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    scheduler.submit([last])
    assert scheduler.waiting == 1
