"""Files of preferences and conversations, as their authors write them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment.data.conventions import read_records
from alignment.data.rows import Malformed
from alignment.records import Message, Pair, Prompt, Response, Side
from megatron_ext.errors import UserError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("user", "Name a colour."), said("assistant", "Red."), said("user", "Another.")]
TULU = {
    "id": "if_1", "source": "ai2-adapt-dev/pref", "prompt": "Name a colour.",
    "chosen": [*ASKED, said("assistant", "Blue.")], "rejected": [*ASKED, said("assistant", "No.")],
    "chosen_model": "a", "rejected_model": "b",
}  # fmt: skip
ULTRA = {
    "prompt": "Name a colour.", "prompt_id": "abc",
    "chosen": [ASKED[0], said("assistant", "Blue.")],
    "rejected": [ASKED[0], said("assistant", "No.")],
    "messages": [ASKED[0], said("assistant", "Blue.")],
    "score_chosen": 8.0, "score_rejected": 5.5,
}  # fmt: skip
HH = {
    "chosen": "\n\nHuman: Hi,\n\nsee: Human: x\n\nAssistant: What?\n\nHuman: Go\n\nAssistant: Ok.",
    "rejected": "\n\nHuman: Hi,\n\nsee: Human: x\n\nAssistant: What?\n\nHuman: Go\n\nAssistant: ",
}


def written(folder: Path, rows: list[Any], suffix: str = "jsonl") -> Path:
    file = folder / f"mine.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def chosen(pair: Any) -> tuple[str, str]:
    """(preferred, other)"""
    assert isinstance(pair, Pair)
    texts = pair.first, pair.second
    return texts if pair.preferred is Side.FIRST else texts[::-1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_preferences(suffix: str, tmp_path: Path) -> None:
    [tulu] = read_records(written(tmp_path, [TULU], suffix))
    assert isinstance(tulu, Pair)
    assert (tulu.id, tulu.source) == ("if_1", "ai2-adapt-dev/pref") and chosen(tulu)[0] == "Blue."
    assert tulu.prompt.messages == tuple(Message(**message) for message in ASKED)
    tie = ULTRA | {"score_rejected": 8.0}
    ultra, equal = read_records(written(tmp_path, [ULTRA, tie], suffix))
    assert isinstance(ultra, Pair) and isinstance(equal, Pair)
    assert ultra.prompt.id == "abc" and chosen(ultra) == ("Blue.", "No.")
    assert equal.preferred is None
    [hh] = read_records(written(tmp_path, [HH], suffix))
    assert isinstance(hh, Pair) and hh.source == "mine" and chosen(hh) == ("Ok.", "")
    contents = [(message.role, message.content) for message in hh.prompt.messages]
    assert contents == [("user", "Hi,\n\nsee: Human: x"), ("assistant", "What?"), ("user", "Go")]
    [text] = read_records(written(tmp_path, [{"prompt": "P", "chosen": "C", "rejected": "R"}]))
    assert isinstance(text, Pair) and chosen(text) == ("C", "R")
    assert text.prompt.messages == (Message("user", "P"),)


def test_conversations_are_prompts_or_responses_by_who_speaks_last(tmp_path: Path) -> None:
    answered = [*ASKED, said("assistant", "Blue.")]
    rows = [{"messages": ASKED}, {"messages": answered}, {"messages": ASKED, "id": 7}]
    prompt, response, other = read_records(written(tmp_path, rows), source="here")
    assert isinstance(prompt, Prompt) and isinstance(response, Response)
    assert response.prompt == prompt and response.text == "Blue." and response.source == "here"
    assert isinstance(other, Prompt) and other.id == "7"


def test_the_side_of_the_chosen_response_tells_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(400)]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    pairs = list(read_records(written(tmp_path, rows)))
    others = list(read_records(written(tmp_path, swapped)))
    firsts = sum(pair.preferred is Side.FIRST for pair in pairs if isinstance(pair, Pair))
    assert 150 < firsts < 250
    for pair, other in zip(pairs, others):
        assert isinstance(pair, Pair) and isinstance(other, Pair)
        assert (pair.first, pair.second) == (other.first, other.second)
        assert pair.preferred is not other.preferred


@pytest.mark.parametrize(
    "row, reason",
    [
        (TULU | {"rejected": [ASKED[0], said("assistant", "No.")]}, "do not answer the same"),
        (TULU | {"rejected": ASKED}, "rejected does not end with an answer"),
        (TULU | {"rejected": [said("assistant", "No.")]}, "rejected does not end with an answer"),
        (TULU | {"chosen": [*ASKED, said("assistant", None)]}, "and text as content"),  # type: ignore[arg-type]
        (TULU | {"chosen": None}, "chosen must be a list of messages"),
        (HH | {"rejected": "No."}, "a transcript begins with"),
        (HH | {"rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, "two turns of Human"),
    ],
)
def test_rows_that_are_no_preferences_are_told(row: Any, reason: str, tmp_path: Path) -> None:
    [malformed] = read_records(written(tmp_path, [row]))
    assert isinstance(malformed, Malformed) and reason in str(malformed)


def test_an_unknown_convention_is_refused_with_its_columns_and_those_that_are_known(
    tmp_path: Path,
) -> None:
    file = written(tmp_path, [{"question": "?", "answer": "!"}])
    with pytest.raises(UserError) as caught:
        list(read_records(file))
    for part in (str(file), "question, answer", "chosen, rejected", "messages", "item, outcome"):
        assert part in str(caught.value)


def test_questions_of_arena_hard(tmp_path: Path) -> None:
    row = {"uid": "2edb", "category": "creative_writing", "subcategory": "poetry", "prompt": "Go"}
    [prompt] = read_records(written(tmp_path, [row]))
    assert prompt == Prompt("2edb", [Message("user", "Go")], "arena-hard/creative_writing")
    [bad] = read_records(written(tmp_path, [row | {"prompt": None}]))
    assert isinstance(bad, Malformed) and "prompt must be text" in str(bad)
