"""Tests of endpoint judges on several ranks: fatal errors, and stored answers."""

import errno
import json
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.endpoints.answer_store import AnswerStore
from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.kinds.judge_kind import JudgeContext
from alignment.judges.kinds.registry import read_judge
from alignment.judges.questions import JudgingTask, Question
from alignment.records import Message, Outcome, Prompt, Response
from megatron_ext.errors import UserError
from tests.alignment.endpoints.endpoint import Endpoint, chat, hang, status
from tests.distributed import run_ranks

ITEMS = [
    Response(str(n), Prompt("p", (Message("user", "say"),)), f"<{'a' * n}>") for n in range(1, 7)
]
TEMPLATE = "=== user ===\n{mark} {prompt} {response} {answer}\n"


def write_spec(folder, name, **changes):
    (folder / "pointwise-item.txt").write_text(TEMPLATE)
    values = {"kind": "endpoint", "model": "m", "template": str(folder / "pointwise-item.txt")}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(values | {"tries": 1, "first_wait": 0.0} | changes))
    return file


def judged(folder, names, room=True):
    """Return this rank's scores of each judge, or its error message."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    engine: Any = SimpleNamespace(data_rank=rank, data_size=size)
    if not room and rank == 1:

        def add(self, answers):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        AnswerStore.add = add  # type: ignore[method-assign]
    result: list[Any] = []
    for name in names:
        spec = read_judge(str(folder / f"{name}.yaml"))
        judge = spec.open(JudgeContext(False, folder / "verdicts", engine))
        try:
            verdicts = judge.judge([Question(item) for item in ITEMS[rank::size]])
            result.append([v.score for v in verdicts])
        except UserError as error:
            result.append(str(error))
    return result


def test_refusing_endpoint_ends_all_ranks_with_one_sentence(tmp_path):
    names = ["key", "address", "silent", "silent"]
    with Endpoint(lambda text, n: status(401)) as refusing, Endpoint() as server:
        server.answer = lambda text: chat("7")
        write_spec(tmp_path, "key", url=refusing.url)
        write_spec(tmp_path, "address", url="localhost:1/v1")
        write_spec(tmp_path, "silent", url=server.url)
        first, second = run_ranks(judged, 2, tmp_path, names)
        calls = sum(server.calls.values())
    assert first == second
    assert first[0].startswith("the judge key: ") and "status 401" in first[0]
    assert (
        first[1].startswith("the judge address: ")
        and "is not the address of an endpoint" in first[1]
    )
    assert first[2] == first[3] and "expected_score: false" in first[2]
    assert calls <= len(ITEMS)  # the completed calls show it too


def test_full_disk_ends_all_ranks_with_one_sentence(tmp_path):
    with Endpoint() as server:
        server.answer = lambda text: chat("7")
        write_spec(tmp_path, "judge", url=server.url, expected_score=False)
        first, second = run_ranks(judged, 2, tmp_path, ["judge"], False)
    assert first == second
    assert "The judge judge cannot store its answers in" in first[0]
    assert "No space left" in first[0]


def test_endpoint_judge_pays_once_on_any_number_of_ranks(tmp_path):
    with Endpoint() as server:
        server.answer = lambda text: chat(str(sum(server.calls.values()) % 10))
        write_spec(tmp_path, "judge", url=server.url, expected_score=False)
        two = run_ranks(judged, 2, tmp_path, ["judge"])
        [one] = run_ranks(judged, 1, tmp_path, ["judge"])
        answers = tmp_path / "verdicts" / "judge.answers"
        with (answers / "share_00001.jsonl").open("a") as file:
            file.write('{"key": "torn')
        (answers / "share_00000.jsonl").unlink()
        three = run_ranks(judged, 3, tmp_path, ["judge"])
        # Of those in the file that is gone, three were nowhere else.
        assert sum(server.answered.values()) == len(ITEMS) + 3
    scores = [s for pair in zip(two[0][0], two[1][0]) for s in pair]
    assert one[0] == scores
    again = [s for three_of in zip(*(result[0] for result in three)) for s in three_of]
    assert again[1::2] == scores[1::2]


def test_endpoint_request_omits_null_settings(tmp_path):
    with Endpoint() as server:
        server.answer = lambda text: chat("7")
        write_spec(tmp_path, "plain", url=server.url, expected_score=False)
        write_spec(tmp_path, "drawn", url=server.url, expected_score=False, top_k=5, top_p=0.9)
        [result] = run_ranks(judged, 1, tmp_path, ["plain", "drawn"])
        bodies = server.bodies
    assert result == [[7.0] * len(ITEMS)] * 2
    plain, sampled = bodies[: len(ITEMS)], bodies[len(ITEMS) :]
    assert all(set(body) == {"model", "messages", "temperature", "max_tokens"} for body in plain)
    assert all((body["temperature"], body["max_tokens"]) == (0.0, 8192) for body in plain)
    assert all((body["top_k"], body["top_p"]) == (5, 0.9) for body in sampled)


def wait_at_most(seconds):
    """Set the time that ranks wait for each other in a collective."""
    from datetime import timedelta

    import torch.distributed as dist

    group = dist.distributed_c10d._get_default_group()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def judged_slowly(folder):
    wait_at_most(3)
    return judged(folder, ["judge"])[0]


def test_slow_endpoint_does_not_time_out_collectives(tmp_path):
    def answer(text):
        time.sleep(6 if text == "a" else 0)
        return chat("7")

    with Endpoint() as server:
        server.answer = answer
        write_spec(tmp_path, "judge", url=server.url, expected_score=False)
        assert run_ranks(judged_slowly, 2, tmp_path) == [[7.0] * 3] * 2


class Stop(Exception):
    """Exception that stands for a signal."""


def stopped(folder):
    """Judge until all answers but one have arrived; return the remaining threads."""
    import torch.distributed as dist

    from alignment.ranks import all_reduce_max

    rank, size = dist.get_rank(), dist.get_world_size()
    engine: Any = SimpleNamespace(data_rank=rank, data_size=size)

    def check():
        files = folder.glob("verdicts/judge.answers/share_*.jsonl")
        if all_reduce_max(sum(f.read_bytes().count(b"\n") for f in files)) == len(ITEMS) - 1:
            raise Stop

    spec = read_judge(str(folder / "judge.yaml"))
    judge = spec.open(JudgeContext(False, folder / "verdicts", engine))
    before = threading.active_count()
    with pytest.raises(Stop):
        judge.judge([Question(item) for item in ITEMS[rank::size]], check)
    return threading.active_count() - before


def test_signal_during_silent_call_keeps_answers(tmp_path):
    with Endpoint(lambda text, number: hang if text == "a" and number == 0 else None) as server:
        server.answer = lambda text: chat("7")
        write_spec(tmp_path, "judge", url=server.url, expected_score=False)
        assert run_ranks(stopped, 2, tmp_path) == [0, 0]
        assert run_ranks(judged, 2, tmp_path, ["judge"]) == [[[7.0] * 3]] * 2
        assert server.calls == {"a" * n: 1 + (n == 1) for n in range(1, 7)}


def test_empty_answer_does_not_count_as_missing_log_probs():
    judging = JudgingTask(JudgeFormat.create(pairwise=False), "judge", expected=True)
    question = Question(ITEMS[0])
    assert judging.inspect(question, Answer("")) == "malformed"
    assert judging.record(question, Answer("")).outcome is Outcome.UNPARSEABLE
    with pytest.raises(UserError, match="gives none"):
        judging.inspect(question, Answer("7"))
