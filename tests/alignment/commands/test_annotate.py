"""Tests of annotation against a real HTTP server that fails in every way, and with kills."""

import io
import json
import math
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignment.commands.annotate import main
from alignment.endpoints.answer_store import AnswerStore
from megatron_ext.errors import UserError
from tests.alignment.endpoints import endpoint
from tests.alignment.endpoints.endpoint import Endpoint, chat, status
from tests.distributed import ROOT
from tests.warm import warm_python

KEY = "MEGATRON_ET_JUDGE_API_KEY"
GARBAGE = [
    status(429, Retry_After="0.2"), status(429), status(500), status(503), status(520), status(524),
    endpoint.reset, endpoint.half, endpoint.body(b""), endpoint.body(b"<html>"),
    endpoint.body(b"\xff\x00"), endpoint.body(b"[" * 100_000), endpoint.body(b'{"choices": [{"mes'),
    endpoint.body(b"not gzip", Content_Encoding="gzip"),
    endpoint.body(b'{"error": {"message": "no provider", "code": 502}}'),
]  # fmt: skip


def prompt(text: str) -> dict[str, Any]:
    return {"id": f"p-{text}", "messages": [{"role": "user", "content": f"Say {text}"}]}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def responses(folder: Path, texts: list[str]) -> Path:
    rows = [{"id": f"r-{t}", "prompt": prompt("it"), "text": f"<{t}>"} for t in texts]
    return write(folder / "responses.jsonl", rows)


def texts_of(count: int) -> list[str]:
    return [f"{number % 10}, {number}" for number in range(count)]


def command(input_file: Path, server: Endpoint, *flags: object) -> list[str]:
    output = input_file.with_name("verdicts.jsonl")
    fixed = ["--judge", server.url, "--model", "judge", "--first-wait", "0.01", "--timeout", "60"]
    files = ["--input", str(input_file), "--output", str(output)]
    module = [warm_python(), "-m", "alignment", "annotate"]
    return [*module, *files, *fixed, *map(str, flags)]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def annotate(input_file: Path, server: Endpoint, *flags: object) -> Done:
    """Run the command in this process; the test of kills starts real processes."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            code, error = main(command(input_file, server, *flags)[4:]), ""
        except UserError as problem:
            code, error = problem.status, f"{problem}\n"
    return Done(code, out.getvalue(), error)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_item_is_answered_once_under_random_endpoint_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a key")
    texts = texts_of(3 * len(GARBAGE) + 2)
    hang = {texts[-1]: endpoint.hang, texts[-2]: endpoint.drip}

    def faults(text: str, call: int) -> endpoint.Fault | None:
        if text in hang:
            return hang[text] if call == 0 else None
        # Every fault affects some items at their first call, and others at their second.
        number = texts.index(text)
        if number < 2 * len(GARBAGE) and call == number // len(GARBAGE):
            return GARBAGE[number % len(GARBAGE)]
        return status(500) if number < 2 * len(GARBAGE) and call == 0 else None

    with Endpoint(faults) as server:
        server.seconds = 0.01
        file = responses(tmp_path, texts)
        done = annotate(file, server, "--concurrency", 6, "--timeout", 4, "--price-in", 2,
                        "--price-out", 10)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert server.answered == Counter(texts)
        assert server.most_at_once <= 6 + 2  # hanging calls remain after their client has left
        assert server.keys == {"Bearer a key"}
        verdicts = rows(tmp_path / "verdicts.jsonl")
        assert [v["item"] for v in verdicts] == [f"r-{t}" for t in texts]
        assert [v["score"] for v in verdicts] == [float(t[0]) for t in texts]
        calls = sum(server.calls.values())
        # An answer has 100 prompt tokens and 10 answer tokens.
        dollars = len(texts) * (100 * 2 + 10 * 10) / 1e6
        assert f"${dollars:,.4f}" in done.stdout
        again = annotate(file, server, "--concurrency", 6)
        assert again.returncode == 0 and sum(server.calls.values()) == calls
        assert f"{len(texts)} answered before" in again.stdout


def test_killed_run_resumes_without_losing_or_repeating_a_label(tmp_path: Path) -> None:
    texts, workers = texts_of(60), 4
    with Endpoint(lambda t, n: status(500) if n == 0 and int(t[3:]) % 5 == 0 else None) as server:
        server.seconds = 0.02
        file = responses(tmp_path, texts)
        flags = ("--concurrency", workers)
        cache = tmp_path / "verdicts.jsonl.answers.jsonl"
        stored: set[str] = set()
        for number, least in ((signal.SIGKILL, 15), (signal.SIGTERM, 35)):
            run = subprocess.Popen(command(file, server, *flags), cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
            while sum(server.answered.values()) < least:
                assert run.poll() is None
                time.sleep(0.01)
            run.send_signal(number)
            output, _ = run.communicate(timeout=60)
            # After SIGTERM the calls in progress are awaited.
            assert run.returncode == (-number if number == signal.SIGKILL else 128 + number), output
            assert not (tmp_path / "verdicts.jsonl").exists()
            with AnswerStore(cache) as store:
                answers = sum(server.answered.values())
                assert stored <= set(store._places)
                stored = set(store._places)
        assert "stopped: repeat the command to resume" in output
        # A torn last line, as a crash of the machine leaves it.
        whole = cache.read_bytes()
        cache.write_bytes(whole + whole.splitlines()[-1][:40])
        asked_again = answers - len(stored)  # calls in progress when a run was killed
        assert 0 <= asked_again <= workers
        done = annotate(file, server, *flags)
        assert done.returncode == 0, done.stderr
        assert "removed the incomplete last line" in done.stdout
        assert sum(server.answered.values()) == len(texts) + asked_again
        assert max(server.answered.values()) <= 2 and set(server.answered) == set(texts)
        assert [v["score"] for v in rows(tmp_path / "verdicts.jsonl")] == [
            float(t[0]) for t in texts
        ]


def test_failures_are_failures_and_too_many_stop_the_run(tmp_path: Path) -> None:
    texts = texts_of(40)
    with Endpoint(lambda t, n: status(400) if int(t[3:]) % 4 == 0 else None) as server:
        file = responses(tmp_path, texts)
        done = annotate(file, server, "--max-failed", 0.1, "--concurrency", 2)
        assert done.returncode == 3 and "--max-failed 0.1" in done.stderr, done.stderr
        assert "this is 400" in done.stderr and done.stderr.count("\n") == 1
        before = server.answered.copy()
        assert 5 < sum(before.values()) < 30 and not (tmp_path / "verdicts.jsonl").exists()
        done = annotate(file, server, "--max-failed", 0.3, "--concurrency", 2)
        assert done.returncode == 0, done.stderr
        assert max(server.answered.values()) == 1  # answers that were paid for were stored
        outcomes = Counter(v["outcome"] for v in rows(tmp_path / "verdicts.jsonl"))
        assert outcomes == {"score": 30, "failed": 10}
        failed = [v for v in rows(tmp_path / "verdicts.jsonl") if v["outcome"] == "failed"]
        assert all(v["score"] is None and "this is 400" in v["reason"] for v in failed)
        server.faults = lambda text, n: None
        done = annotate(file, server)
        assert done.returncode == 0 and "30 answered before" in done.stdout
        assert {v["outcome"] for v in rows(tmp_path / "verdicts.jsonl")} == {"score"}
        assert server.answered == Counter(texts)


@pytest.mark.parametrize("fault, message", [(status(401), "status 401: this is 401"),
                                         (status(404), "status 404: this is 404")])  # fmt: skip
def test_endpoint_that_refuses_every_request_is_called_once(
    tmp_path: Path, fault: Any, message: str
) -> None:
    with Endpoint(lambda text, n: fault) as server:
        done = annotate(responses(tmp_path, texts_of(9)), server, "--concurrency", 1)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert sum(server.calls.values()) == 1


def test_pairs_are_shown_in_both_orders_and_samples_are_calls_of_their_own(tmp_path: Path) -> None:
    pairs = [{"id": f"x{i}", "prompt": prompt("it"), "first": f"<{i}>", "second": f"<other {i}>"}
             for i in range(3)]  # fmt: skip
    file = write(tmp_path / "pairs.jsonl", pairs)
    with Endpoint() as server:
        # The judge always prefers the first response.
        server.answer = lambda text: chat("<think>I like A.</think>A")
        done = annotate(file, server, "--samples", 2, "--temperature", 0.7, "--seed", 5,
                        "--thinking", "asked")  # fmt: skip
        assert done.returncode == 0, done.stderr
        verdicts = rows(tmp_path / "verdicts.jsonl")
        assert len(verdicts) == len(server.bodies) == 3 * 2 * 2
        for v in verdicts:
            assert v["preferred"] == ("second" if v["swapped"] else "first")
            assert v["thinking"] == "I like A."
        assert server.answered == {f"{x}{i}": 2 for x in ("", "other ") for i in range(3)}
        assert Counter(b["seed"] for b in server.bodies) == {5: 6, 6: 6}
        assert {b["temperature"] for b in server.bodies} == {0.7}


def test_truncated_or_malformed_answer_is_no_score(tmp_path: Path) -> None:
    messages = {
        "a": chat("I would say", finish_reason="length"),
        "b": chat("ten"),
        "c": chat("", message={"content": None, "reasoning_content": "hm"}),
        "d": chat("4", message={"reasoning_content": "hm"}),
    }
    with Endpoint() as server:
        server.answer = lambda text: messages[text]
        done = annotate(responses(tmp_path, list(messages)), server, "--max-failed", 0.75)
        assert done.returncode == 0, done.stderr
        a, b, c, d = rows(tmp_path / "verdicts.jsonl")
        assert (a["outcome"], a["reason"]) == ("failed", "cut off after 10 tokens")
        assert (c["outcome"], c["reason"]) == ("failed", "the answer has no content")
        assert b["outcome"] == "unparseable" and c["thinking"] == "hm"
        assert (d["score"], d["thinking"], d["answer"]) == (4.0, "hm", "4")


def test_expected_scores_are_those_of_the_likeliest_digits_at_the_label(tmp_path: Path) -> None:
    def token(text: str, likely: dict[str, float]) -> dict[str, Any]:
        top = [{"token": t, "logprob": p} for t, p in likely.items()]
        return {"token": text, "logprob": likely[text], "top_logprobs": top}

    likely = {" 7": -1.0, "7": -2.0, "8": -1.5, "x": -0.1, " 0": -9999.0}
    content = [token("3", {"3": 0.0}), token("</think>", {"</think>": 0.0}), token(" 7", likely)]
    with Endpoint() as server:
        server.answer = lambda text: chat("<think>3 of 4</think> 7", logprobs={"content": content})
        done = annotate(
            responses(tmp_path, ["a"]), server, "--expected-score", "--thinking", "asked"
        )
        assert done.returncode == 0, done.stderr
        [verdict] = rows(tmp_path / "verdicts.jsonl")
        seven, eight = math.exp(-1.0) + math.exp(-2.0), math.exp(-1.5)
        assert verdict["score"] == pytest.approx((7 * seven + 8 * eight) / (seven + eight))
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20
        server.answer = lambda text: chat("7")
        done = annotate(responses(tmp_path, ["b"]), server, "--expected-score", "--overwrite")
        assert done.returncode == 2 and "the endpoint gives none" in done.stderr


def test_a_policy_answers_prompts(tmp_path: Path) -> None:
    prompts = [prompt(f"<{i}>") for i in range(3)]
    with Endpoint(lambda text, n: status(400) if text == "2" else None) as server:
        server.answer = lambda text: chat(f"Well, {text}.")
        flags = ("--generate", "--samples", 2, "--temperature", 1, "--max-failed", 0.5)
        done = annotate(write(tmp_path / "prompts.jsonl", prompts), server, *flags)
        assert done.returncode == 0, done.stderr
        made = rows(tmp_path / "verdicts.jsonl")
        assert [r["text"] for r in made] == ["Well, 0."] * 2 + ["Well, 1."] * 2
        assert len({r["id"] for r in made}) == 4 and {r["source"] for r in made} == {"judge"}
        requests = [body["messages"] for body in server.bodies]
        assert all(len(messages) == 1 and messages[0]["role"] == "user" for messages in requests)
        assert {messages[0]["content"] for messages in requests} == {f"Say <{i}>" for i in range(3)}
        done = annotate(tmp_path / "verdicts.jsonl", server, "--generate")
        assert done.returncode == 2 and "row 1 is a response" in done.stderr


def test_dead_endpoint_is_detected_before_many_requests_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, stored, add = texts_of(60), threading.Event(), AnswerStore.add

    def add_and_tell(self: AnswerStore, answers: Any) -> None:
        add(self, answers)
        if len(self) == 30:
            stored.set()

    def faults(text: str, call: int) -> endpoint.Fault | None:
        if int(text[3:]) < 30:
            return None
        stored.wait(60)  # an answer that comes late would end the row of failures
        return status(503)

    monkeypatch.setattr(AnswerStore, "add", add_and_tell)
    with Endpoint(faults) as server:
        flags = ("--max-failed", 1, "--tries", 2, "--concurrency", 4)
        done = annotate(responses(tmp_path, texts), server, *flags)
        assert done.returncode == 3 and "20 consecutive calls" in done.stderr, done.stderr
        assert sum(server.answered.values()) == 30
        assert 2 * 20 <= sum(server.calls.values()) - 30 <= 2 * 24


def test_gold_writes_rubrics_which_judges_are_then_shown(tmp_path):
    rows = [prompt("<one>"), prompt("<two>") | {"rubric": "an old one"}, prompt("<cut>")]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with Endpoint() as server:
        server.answer = lambda text: (
            chat("- half of", finish_reason="length") if text == "cut" else chat(f"- says {text}\n")
        )
        assert annotate(prompts, server, "--rubrics").returncode == 3  # one of three is truncated
        made = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
        assert {row["id"]: row["rubric"] for row in made} == {
            "p-<one>": "- says one",
            "p-<two>": "- says two",
        }
        [system, user] = server.bodies[0]["messages"]
        assert "rubrics" in system["content"] and "Write a rubric" in user["content"]
        items = [{"id": "r", "prompt": made[0], "text": "<item>"}]
        server.answer = lambda text: chat("7")
        again = write(tmp_path / "shown.jsonl", items)
        flags = ("--template", "pointwise-rubric", "--overwrite")
        assert annotate(again, server, *flags).returncode == 0
        assert "- says one" in server.bodies[-1]["messages"][1]["content"]
    with pytest.raises(UserError, match="--rubrics is incompatible with --generate"):
        main(command(prompts, server, "--rubrics", "--generate")[4:])
