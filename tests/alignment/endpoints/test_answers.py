"""Tests of the bodies of chat endpoints, in every shape that servers return."""

import json
from typing import Any

import pytest

from alignment.endpoints.chat_client import same_model
from alignment.endpoints.endpoint_errors import EndpointError, ErrorKind, error_of_status
from alignment.endpoints.usage import Prices, TokenUsage
from alignment.judges.formats.answers import Answer, read_answer
from tests.alignment.endpoints.endpoint import chat


def read(body: Any, **more: Any) -> Answer:
    return read_answer(body if isinstance(body, bytes) else json.dumps(body).encode(), **more)


def message(**fields: Any) -> Answer:
    return read({"choices": [{"finish_reason": "stop", "message": fields}]})


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("content", "text", "thinking"),
    [
        ("7", "7", ""),
        ("", "", ""),
        ([{"type": "text", "text": "7"}], "7", ""),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b", ""),
        ([THINKING, {"type": "text", "text": "7"}], "7", "hm"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "7"}], "7", "hm"),
        ([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "7"}], "7", ""),
        (["7"], "7", ""),
        ({"type": "text", "text": "7"}, "7", ""),
        ([], "", ""),
    ],
)
def test_text_parts_are_joined_and_thinking_is_separate(content, text, thinking):
    answer = message(content=content)
    assert (answer.text, answer.thinking, answer.problem) == (text, thinking, "")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("value", ["hm", [{"type": "text", "text": "hm"}]])
def test_thinking_is_read_from_every_known_response_field(name, value):
    assert message(content="7", **{name: value}).thinking == "hm"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"content": None}, "has no content"),
        ({}, "has no content"),
        ({"content": None, "refusal": "I cannot."}, "the model refused: I cannot."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "the model refused: No."),
        ({"content": None, "tool_calls": [{"function": {}}]}, "a call of a tool"),
        ({"content": "", "function_call": {"name": "score"}}, "a call of a tool"),
        ({"content": 7}, "not text but 7"),
        ({"content": True}, "not text but True"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
        ({"content": [{"type": "text", "text": None}]}, "a part of type 'text' without text"),
        ({"content": "7\ud800"}, "a lone surrogate"),
        ({"content": "7", "reasoning": {"effort": 3}}, "a part of type 'text' without text"),
    ],
)
def test_answer_without_text_of_the_model_has_a_problem(fields, problem):
    answer = message(**fields)
    assert problem in answer.problem and answer.missing == answer.problem
    json.dumps(answer.to_row()).encode()


def test_a_filtered_answer_is_none_even_with_text_and_a_cut_off_one_is_one_with_text():
    filtered = read(chat("7", finish_reason="content_filter"))
    assert filtered.missing == "the endpoint's content filter stopped the answer"
    assert read(chat("7", finish_reason="length")).missing == ""
    cut = read(chat("x", message={"content": None}, finish_reason="length"))
    assert cut.missing == "cut off after 10 tokens"
    for unknown in (None, "end_turn", "eos", 3, ["stop"]):
        assert read(chat("7", finish_reason=unknown)).missing == ""


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 100, "completion_tokens": 10}, (100, 10)),
        ({"prompt_tokens": "100", "completion_tokens": 10.0}, (100, 10)),
        ({"input_tokens": 100, "output_tokens": 0}, (100, 0)),
        ({"prompt_tokens": 100}, (100, None)),
        ({"prompt_tokens": "n/a", "completion_tokens": 12.7}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": {"text": 5}, "completion_tokens": [1]}, (None, None)),
        ({"prompt_tokens": float("nan"), "completion_tokens": 1e300}, (None, None)),
        ({"total_tokens": 110}, (None, None)),
        (None, (None, None)), ([], (None, None)), ("110", (None, None)),
    ],
)  # fmt: skip
def test_usage_is_read_or_unknown_and_never_zero_instead(usage, counts):
    answer = read(chat("7") | {"usage": usage})
    assert (answer.prompt_tokens, answer.completion_tokens) == counts and answer.text == "7"
    used, prices = TokenUsage.of(answer), Prices(1.0, 1.0)
    assert used.uncounted == (None in counts)
    assert (used.to_json(prices)["dollars"] is None) == (None in counts)
    assert ("usage of 1 answers unknown" in used.summary(prices)) == (None in counts)


@pytest.mark.parametrize(
    ("body", "kind", "words", "tries"),
    [
        (
            {"error": {"message": "no provider", "code": 502}},
            ErrorKind.PASSING,
            "no provider",
            None,
        ),
        (
            {"error": {"message": "bad key", "code": 401}},
            ErrorKind.FATAL,
            "code 401: bad key",
            None,
        ),
        ({"error": {"message": "bad key", "code": "403"}}, ErrorKind.FATAL, "bad key", None),
        (
            {"error": {"message": "slow", "code": "rate_limit_exceeded"}},
            ErrorKind.PASSING,
            "slow",
            None,
        ),
        ({"error": {"message": "pay", "type": "insufficient_quota"}}, ErrorKind.FATAL, "pay", None),
        (
            {"error": {"message": "long", "code": "context_length_exceeded"}},
            ErrorKind.REFUSED,
            "lo",
            None,
        ),
        ({"error": "all is lost"}, ErrorKind.PASSING, "all is lost", None),
        ([{"error": {"code": 401, "message": "who?"}}], ErrorKind.FATAL, "who?", None),
        ({"object": "error", "message": "gone", "code": 404}, ErrorKind.FATAL, "gone", None),
        ({"detail": "Not Found"}, ErrorKind.PASSING, "Not Found", None),
        (
            {"choices": [{"error": {"code": 502, "message": "upstream"}}]},
            ErrorKind.PASSING,
            "upst",
            None,
        ),
        (chat("7", finish_reason="error"), ErrorKind.PASSING, "finish_reason error", 2),
        ({"choices": []}, ErrorKind.REFUSED, "it has no choices", None),
        ({"choices": None, "usage": None}, ErrorKind.REFUSED, "it has no choices", None),
        ({"choices": [{}]}, ErrorKind.REFUSED, "it has no message", None),
        ({"choices": [{"message": None}]}, ErrorKind.REFUSED, "it has no message", None),
        ({"choices": ["7"]}, ErrorKind.REFUSED, "it has no message", None),
        ({}, ErrorKind.REFUSED, "it has no choices", None),
        ([], ErrorKind.REFUSED, "it has no choices", None),
        (b"7", ErrorKind.REFUSED, "it has no choices", None),
        (b"", ErrorKind.PASSING, "an empty answer", None),
        (b"<html>502</html>", ErrorKind.PASSING, "is not JSON: '<html>502", None),
        (b"\xff\xfe\x00", ErrorKind.PASSING, "is not JSON", None),
        (b"[" * 100_000, ErrorKind.PASSING, "is not JSON", None),
        (b'{"choices": [{"message": {"content": "7"', ErrorKind.PASSING, "cut short or damaged", 2),
    ],
)
def test_body_without_an_answer_gives_a_reason_and_whether_to_retry(body, kind, words, tries):
    with pytest.raises(EndpointError) as failed:
        read(body, seconds=3.0)
    assert failed.value.kind is kind and failed.value.tries == tries
    assert words in str(failed.value) and len(str(failed.value)) < 300


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"message": "maximum context length is 4096 tokens", "code": 400}, ErrorKind.REFUSED),
        (400, {"message": "x", "code": "unsupported_parameter"}, ErrorKind.FATAL),
        (400, {"message": "Unrecognized request argument supplied: top_k"}, ErrorKind.FATAL),
        (422, {"message": "Extra inputs are not permitted"}, ErrorKind.FATAL),
        (400, {"message": "x", "code": "model_not_found"}, ErrorKind.FATAL),
        (400, "a sentence", ErrorKind.REFUSED),
        (401, {}, ErrorKind.FATAL), (402, {}, ErrorKind.FATAL),
        (403, {}, ErrorKind.FATAL), (404, {}, ErrorKind.FATAL),
        (408, {}, ErrorKind.PASSING), (429, {}, ErrorKind.PASSING), (500, {}, ErrorKind.PASSING),
        (429, {"message": "x", "type": "insufficient_quota"}, ErrorKind.FATAL),
        (501, {}, ErrorKind.FATAL), (503, {}, ErrorKind.PASSING), (529, {}, ErrorKind.PASSING),
        (413, {}, ErrorKind.REFUSED),
    ],
)  # fmt: skip
def test_statuses_are_fatal_passing_or_of_one_request(status, error, kind):
    failed = error_of_status(status, json.dumps({"error": error}).encode(), None)
    assert failed.kind is kind and str(failed).startswith(f"status {status}: ")


def test_a_page_of_a_proxy_is_shown_without_its_tags():
    page = b"<html><style>b {}</style><body><h1>502</h1>\nBad  Gateway</body></html>"
    assert str(error_of_status(502, page, None)) == "status 502: 502 Bad Gateway"
    assert str(error_of_status(500, b"", None)) == "status 500: no message"


@pytest.mark.parametrize(
    ("requested", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("openai/gpt-4o", "gpt-4o-2024-08-06", True),
        ("claude-sonnet-4", "claude-sonnet-4@20250514", True),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022", True),
        ("Qwen/Qwen3-8B", "qwen/qwen3-8b", True),
        ("/models/judge/", "judge", True),
        ("llama3", "llama3:latest", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-08-06", False),
        ("qwen3-8b", "qwen3-80b", False),
        ("meta/llama", "other/llama", False),
        ("judge", "some-other-model-2b", False),
    ],
)
def test_same_model_accepts_snapshots_and_owners_only(requested, answered, same):
    assert same_model(requested, answered) is same


def test_answers_of_earlier_versions_are_read():
    row = {"text": "7", "thinking": "", "finish": "stop", "prompt_tokens": 3,
           "completion_tokens": 1, "labels": [["7", {"7": -0.1}]]}  # fmt: skip
    assert Answer.from_row(row).labels == [("7", {"7": -0.1}, 0.0)]
    new = read(chat("7"))
    assert Answer.from_row(json.loads(json.dumps(new.to_row()))) == new
