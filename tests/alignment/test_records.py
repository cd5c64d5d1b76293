"""Tests of the records of alignment."""

import json
from typing import Any

import pytest

from alignment.records import Message, Outcome, Pair, Prompt, Response, Side, Verdict
from megatron_ext.errors import UserError

PROMPT = Prompt("p", [Message("user", "Why?")], "here")
VERDICT = {"item": "r", "outcome": "score", "score": 1}


@pytest.mark.parametrize(
    "record",
    [
        PROMPT,
        Response("r", PROMPT, "", "model"),
        Pair("x", PROMPT, "a", "b", Side.SECOND),
        Verdict("r", Outcome.SCORE, score=3.5, judge="j"),
        Verdict("x", Outcome.PREFERENCE, preferred=Side.FIRST, swapped=True),
        Verdict("r", Outcome.FAILED, reason="timed out after 3 s"),
    ],
)
def test_record_round_trips_through_json(record: Any) -> None:
    row = json.loads(json.dumps(record.to_row()))
    back = type(record).from_row(row)
    assert back == record
    assert back.to_row() == record.to_row()


@pytest.mark.parametrize(
    "kind, row, message",
    [
        (Prompt, {"id": "p"}, "missing 1 required positional argument: 'messages'"),
        (Prompt, {"id": "p", "messages": []}, "messages must be a list of at least one"),
        (
            Prompt,
            {"id": "p", "messages": ["hi"]},
            "a message must be a mapping with role and content, not 'hi'",
        ),
        (Prompt, {"id": "p", "messages": [{"role": "me", "content": ""}]}, "role is one of"),
        (Prompt, {"id": 3, "messages": [{"role": "user", "content": ""}]}, "id must be text"),
        (Prompt, {"id": "p", "mesages": []}, "unknown field 'mesages'"),
        (
            Prompt,
            {"id": "p", "messages": [{"role": "assistant", "content": "x"}]},
            "ends with the assistant's message",
        ),
        (
            Response,
            {"id": "r", "prompt": "hi", "text": ""},
            "prompt must be a mapping with the fields",
        ),
        (Pair, PROMPT.to_row() | {"preferred": "a"}, "unknown field 'messages'"),
        (Verdict, {"item": "r", "outcome": "score"}, "must have a score if and only if"),
        (
            Verdict,
            {"item": "r", "outcome": "score", "score": "7"},
            "must be a finite number, not '7'",
        ),
        (Verdict, {"item": "r", "outcome": "score", "score": float("nan")}, "a finite number"),
        (Verdict, VERDICT | {"swapped": "false"}, "swapped must be true or false, not 'false'"),
        (Verdict, VERDICT | {"sample": None}, "sample must be a whole number from 0, not None"),
        (Verdict, VERDICT | {"sample": -1}, "sample must be a whole number from 0, not -1"),
        (Verdict, VERDICT | {"sample": 0.5}, "sample must be a whole number from 0, not 0.5"),
        (Verdict, {"item": "r", "outcome": "failed"}, "must have a reason if and only if"),
        (Verdict, {"item": "r", "outcome": "tie", "score": 0}, "must have a score if and only if"),
        (Verdict, {"item": "r", "outcome": "zero", "score": 0}, "outcome is one of score, "),
    ],
)
def test_invalid_row_is_refused_with_the_reason(
    kind: Any, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind.from_row(row)


def test_metadata_of_a_prompt_survives_a_row_and_is_left_out_where_there_is_none():
    bare = {"id": "1", "messages": [{"role": "user", "content": "2 + 2?"}]}
    assert "metadata" not in Prompt.from_row(bare).to_row()
    row = bare | {"metadata": {"answer": 4, "tests": ["assert True"], "empty": None}}
    prompt = Prompt.from_row(row)
    assert prompt.metadata == {"answer": 4, "tests": ["assert True"]}
    response = Response("r", prompt, "4")
    assert Response.from_row(json.loads(json.dumps(response.to_row()))) == response
    assert Prompt.from_row(bare | {"metadata": None}).metadata == {}
    assert hash(prompt)
    with pytest.raises(UserError, match="metadata must be a mapping"):
        Prompt.from_row(bare | {"metadata": "answer"})
