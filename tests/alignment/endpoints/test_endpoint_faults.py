"""Tests of annotation with faulty endpoints, and of its number of calls."""

import json
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.commands.test_annotate import (
    Done,
    annotate,
    prompt,
    responses,
    rows,
    texts_of,
    write,
)
from tests.alignment.endpoints import endpoint
from tests.alignment.endpoints.endpoint import Endpoint, chat

TEXTS = list("abcdefg")


def failing(status: int, error: Any, **headers: str) -> endpoint.Fault:
    content = json.dumps({"error": error}).encode()
    return lambda handler: handler.reply(status, content, **headers)


def ask(
    tmp_path: Path, answer: Callable[[str], Any] | endpoint.Fault, *flags: object, times: int = 1
) -> tuple[list[Done], int]:
    """Annotate seven responses several times; return the verdicts and the number of calls."""
    with Endpoint() as server:
        server.answer = answer  # type: ignore[assignment]
        file = responses(tmp_path, TEXTS)
        fast = ("--first-wait", 0.001, "--concurrency", 1, *flags)
        done = [annotate(file, server, *fast) for _ in range(times)]
        return done, sum(server.calls.values())


def faulty(tmp_path: Path, fault: endpoint.Fault, *flags: object, calls: int = 10**9) -> Any:
    """Annotate by an endpoint whose first calls fail and that then answers 7."""
    with Endpoint() as server:
        server.answer = lambda text: chat("7")
        server.faults = lambda text, n: fault if sum(server.calls.values()) <= calls else None
        done = annotate(responses(tmp_path, TEXTS), server, "--first-wait", 0.001,
                        "--concurrency", 1, *flags)  # fmt: skip
        return done, sum(server.calls.values())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (chat("I would say", finish_reason="length"), "cut off after 10 tokens (7 times)"),
        (chat("ten"), "(7 times)"),
        (chat("7", finish_reason="content_filter"), "content filter stopped the answer (7 times)"),
        (chat("", message={"content": None, "refusal": "No."}), "the model refused: No. (7 times)"),
        (chat("", message={"content": None, "tool_calls": [{}]}), "a call of a tool"),
        (chat("", message={"content": 7}), "not text but 7"),
    ],
)
def test_answers_without_a_verdict_end_with_status_3_and_are_paid_for_once(
    tmp_path: Path, answer: dict[str, Any], reason: str
) -> None:
    flags = ("--concurrency", 7, "--max-failed", 0.9)
    done, calls = ask(tmp_path, lambda text: answer, *flags, times=2)
    assert calls == 7
    for one in done:
        assert one.returncode == 3 and reason in one.stderr, one
        assert "7 of 7 questions have no verdict, more than --max-failed 0.9" in one.stderr
    verdicts = rows(tmp_path / "verdicts.jsonl")
    assert len(verdicts) == 7 and all(v["score"] is None and v["reason"] for v in verdicts)


def test_a_run_that_cannot_succeed_any_more_ends_before_it_has_paid_for_all(tmp_path: Path) -> None:
    texts = texts_of(60)
    with Endpoint() as server:
        server.answer = lambda text: chat("ten")
        file = responses(tmp_path, texts)
        for calls in (20, 21):  # the second time the first 20 are known
            done = annotate(file, server, "--max-failed", 0.3, "--concurrency", 1)
            assert done.returncode == 3 and sum(server.calls.values()) == calls
            assert "of 60 questions have no verdict, more than --max-failed 0.3" in done.stderr
            assert not (tmp_path / "verdicts.jsonl").exists()
        server.answer = lambda text: chat("7")
        done = annotate(file, server, "--max-failed", 0.4)
        assert done.returncode == 0 and sum(server.calls.values()) == 60


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}'])
def test_body_of_another_shape_is_not_requested_again(tmp_path: Path, body: bytes) -> None:
    done, calls = faulty(tmp_path, endpoint.body(body), "--max-failed", 0.99)
    assert (done.returncode, calls) == (3, 7)
    assert "not one of the chat API" in done.stderr and "(7 times)" in done.stderr


def test_torn_body_is_requested_once_more(tmp_path: Path) -> None:
    fault = endpoint.body(b'{"choices": [{"message": {"content": "7"')
    done, calls = faulty(tmp_path, fault, "--max-failed", 0.99)
    assert (done.returncode, calls) == (3, 14) and "cut short or damaged" in done.stderr
    done, calls = faulty(tmp_path, fault, calls=1)
    assert (done.returncode, calls) == (0, 8)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (failing(200, {"message": "Invalid API key", "code": 401}), "code 401: Invalid API key"),
        (failing(429, {"message": "pay", "code": "insufficient_quota"}), "status 429: pay"),
        (failing(400, {"message": "no top_k", "code": "unsupported_parameter"}), "no top_k"),
        (lambda h: h.reply(307, b"", Location="/v2"), "status 307, which redirects to /v2"),
    ],
)
def test_fatal_error_ends_annotate_at_the_first_call(
    tmp_path: Path, fault: Any, words: str
) -> None:
    done, calls = faulty(tmp_path, fault)
    assert (done.returncode, calls) == (2, 1)
    assert "refuses every question with" in done.stderr and words in done.stderr


def test_error_in_an_answer_of_status_200_is_retried(tmp_path: Path) -> None:
    fault = failing(200, {"message": "overloaded", "code": 502})
    done, calls = faulty(tmp_path, fault, calls=2)
    assert (done.returncode, calls) == (0, 9)
    assert [v["score"] for v in rows(tmp_path / "verdicts.jsonl")] == [7.0] * 7


@pytest.mark.parametrize(
    # Names that do not depend on the time: every worker must collect the same tests.
    "wait",
    ["86400", "1e30", formatdate(time.time() + 86400, usegmt=True)],
    ids=["seconds", "beyond all bounds", "date"],
)
def test_longer_wait_than_allowed_ends_the_run_with_its_length(tmp_path: Path, wait: str) -> None:
    begin = time.monotonic()
    fault = failing(429, {"message": "daily quota"}, Retry_After=wait)
    done, calls = faulty(tmp_path, fault)
    assert (done.returncode, calls) == (3, 1) and time.monotonic() - begin < 10
    assert "requests a wait until " in done.stderr and "status 429: daily quota" in done.stderr
    assert "--max-wait is 600" in done.stderr


@pytest.mark.parametrize("wait", ["-5", "soon", "", "0", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_invalid_retry_after_is_an_ordinary_retry(tmp_path: Path, wait: str) -> None:
    fault = failing(429, {"message": "slow"}, Retry_After=wait)
    done, calls = faulty(tmp_path, fault, calls=2)
    assert (done.returncode, calls) == (0, 9)


def test_a_wait_is_reported_once_with_status_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.endpoints.client._LONG", 0.1)
    done, _ = faulty(tmp_path, failing(429, {"message": "slow"}, Retry_After="0.3"), calls=1)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("waiting until ")]
    assert line.endswith("status 429: slow") and "(0 s)" in line
    done, _ = faulty(tmp_path, failing(429, {}, Retry_After="0.3"), "--max-wait", 0.2)
    assert done.returncode == 0  # all questions are answered


@pytest.mark.parametrize("answered", ["some-other-model-2b", "judge-2025-01-31", "org/judge"])
def test_the_answering_model_is_recorded_and_another_is_reported_once(
    tmp_path: Path, answered: str
) -> None:
    [done], _ = ask(tmp_path, lambda text: chat("7") | {"model": answered})
    assert done.returncode == 0
    about = json.loads((tmp_path / "verdicts.jsonl.about.json").read_text())
    assert about["models"] == {answered: 7}
    warned = f"answers as {answered!r}"
    assert done.stdout.count(warned) == (answered == "some-other-model-2b")


def test_unknown_usage_is_reported_without_a_cost_of_zero(tmp_path: Path) -> None:
    def answer(text: str) -> dict[str, Any]:
        return chat("7") if text == "a" else chat("7") | {"usage": {"prompt_tokens": "n/a"}}

    [done], calls = ask(tmp_path, answer, "--price-in", 1, "--price-out", 1)
    assert (done.returncode, calls) == (0, 7)
    assert "at least $0.0001 (usage of 6 answers unknown)" in done.stdout
    used = json.loads((tmp_path / "verdicts.jsonl.about.json").read_text())["used"]
    assert used["dollars"] is None and used["uncounted"] == 6 and used["prompt_tokens"] == 100


@pytest.mark.parametrize(
    "log_probs",
    [
        None,
        {"content": None},
        {"content": [{"token": "7", "logprob": -0.1, "top_logprobs": None}]},
        {"content": [{"token": "7", "logprob": -0.1, "top_logprobs": []}]},
        {"content": [{"token": "7", "logprob": -0.1}]},
        {"content": [{"token": "7", "logprob": -0.1,
                      "top_logprobs": [{"token": "6", "logprob": None}]}]},
    ],
)  # fmt: skip
def test_log_probabilities_that_cannot_be_used_end_the_run_at_the_first_answer(
    tmp_path: Path, log_probs: Any
) -> None:
    [done], calls = ask(tmp_path, lambda text: chat("7", logprobs=log_probs), "--expected-score")
    assert (done.returncode, calls) == (2, 1)
    assert "--expected-score needs log-probabilities" in done.stderr
    top = [{"token": "7", "logprob": -0.1}]
    good = {"content": [{"token": "7", "logprob": -0.1, "top_logprobs": top}]}
    # The server was restarted with them: only that answer is requested again.
    [done], calls = ask(tmp_path, lambda text: chat("7", logprobs=good), "--expected-score")
    assert (done.returncode, calls) == (0, 7)


def test_an_expectation_over_part_of_the_probability_is_no_score(tmp_path: Path) -> None:
    top = [{"token": "7", "logprob": -3.0}]
    part = {"content": [{"token": "7", "logprob": -3.0, "top_logprobs": top}]}
    flags = ("--expected-score", "--concurrency", 7)
    [done], _ = ask(tmp_path, lambda text: chat("7", logprobs=part), *flags)
    assert done.returncode == 3 and "the labels listed have a probability of 0.05" in done.stderr


def test_a_policys_filtered_and_missing_answers_are_no_responses(tmp_path: Path) -> None:
    messages = {
        "a": chat("An answer."),
        "b": chat("", message={"content": None}, finish_reason="content_filter"),
        "c": chat("Half of", finish_reason="content_filter"),
        "d": chat("Long", finish_reason="length"),
        "e": chat("", message={"content": None}, finish_reason="length"),
        "f": chat(""),
    }
    prompts = write(tmp_path / "prompts.jsonl", [prompt(f"<{text}>") for text in messages])
    with Endpoint() as server:
        server.answer = lambda text: messages[text]
        done = annotate(prompts, server, "--generate", "--concurrency", 6, "--max-failed", 0.4)
        assert done.returncode == 3 and "3 of 6 questions have no response" in done.stderr
        assert [r["text"] for r in rows(tmp_path / "verdicts.jsonl")] == ["An answer.", "Long", ""]
        done = annotate(prompts, server, "--generate", "--max-failed", 0.5)
        assert done.returncode == 0 and sum(server.calls.values()) == 6
