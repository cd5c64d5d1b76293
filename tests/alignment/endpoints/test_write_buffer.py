"""Tests of answers that are written while the event loop runs calls."""

import asyncio
import errno
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.write_buffer import WriteBuffer


class SlowStore(AnswerStore):
    """Store on a slow disk that counts its writes."""

    writes = 0

    def add(self, answers: Any) -> None:
        time.sleep(0.2)
        super().add(answers)
        self.writes += 1


def test_the_loop_runs_while_the_disk_is_busy_and_later_answers_share_a_write(
    tmp_path: Path,
) -> None:
    async def run(store: AnswerStore) -> tuple[int, int]:
        ticks = ended = 0

        async def one(number: int) -> None:
            nonlocal ended
            await buffer.add(f"k{number}", {"text": str(number)})
            assert f"k{number}" in store  # on the disk before it counts
            ended += 1

        async with WriteBuffer(store) as buffer:
            tasks = [asyncio.create_task(one(number)) for number in range(50)]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.01)
                ticks += 1
            await asyncio.gather(*tasks)
        return ticks, ended

    store = SlowStore(tmp_path / "answers.jsonl")
    with store:
        ticks, ended = asyncio.run(run(store))
        assert ended == len(store) == 50 and store.writes <= 2
        assert ticks >= 5  # a write on the loop would leave none


def test_submitted_rows_are_written_although_the_caller_was_cancelled(
    tmp_path: Path,
) -> None:
    async def run(store: AnswerStore) -> None:
        async with WriteBuffer(store) as buffer:
            tasks = [asyncio.create_task(buffer.add(f"k{n}", {})) for n in range(9)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()

    with SlowStore(tmp_path / "answers.jsonl") as store:
        asyncio.run(run(store))
        assert len(store) == 9


def test_a_failed_write_is_the_error_of_each_call_and_the_next_is_tried(tmp_path: Path) -> None:
    class Full(AnswerStore):
        failing = True

        def add(self, answers: Any) -> None:
            if self.failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add(answers)

    async def run(store: Full) -> None:
        async with WriteBuffer(store) as buffer:
            with pytest.raises(OSError, match="No space left"):
                await buffer.add("a", {})
            store.failing = False
            await buffer.add("b", {})

    store = Full(tmp_path / "answers.jsonl")
    with store:
        asyncio.run(run(store))
        assert "a" not in store and "b" in store
