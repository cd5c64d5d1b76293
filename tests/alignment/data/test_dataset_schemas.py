"""Tests of files of preferences and conversations in the schemas of known datasets."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment.data.dataset_schemas import RecordFile, read_records
from alignment.records import Message, Pair, Prompt, Response, Side
from megatron_ext.data.row_files import MalformedRow
from megatron_ext.errors import UserError


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "Name a colour."), turn("assistant", "Red."), turn("user", "Another.")]
TULU = {
    "id": "if_1", "source": "ai2-adapt-dev/pref", "prompt": "Name a colour.",
    "chosen": [*ASKED, turn("assistant", "Blue.")], "rejected": [*ASKED, turn("assistant", "No.")],
    "chosen_model": "a", "rejected_model": "b",
}  # fmt: skip
ULTRA = {
    "prompt": "Name a colour.", "prompt_id": "abc",
    "chosen": [ASKED[0], turn("assistant", "Blue.")],
    "rejected": [ASKED[0], turn("assistant", "No.")],
    "messages": [ASKED[0], turn("assistant", "Blue.")],
    "score_chosen": 8.0, "score_rejected": 5.5,
}  # fmt: skip
HH = {
    "chosen": "\n\nHuman: Hi,\n\nsee: Human: x\n\nAssistant: What?\n\nHuman: Go\n\nAssistant: Ok.",
    "rejected": "\n\nHuman: Hi,\n\nsee: Human: x\n\nAssistant: What?\n\nHuman: Go\n\nAssistant: No",
}


def written(folder: Path, rows: list[Any], suffix: str = "jsonl") -> Path:
    file = folder / f"mine.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def chosen(pair: Any) -> tuple[str, str]:
    """Return the preferred and the other response."""
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
    assert isinstance(hh, Pair) and hh.source == "mine" and chosen(hh) == ("Ok.", "No")
    contents = [(message.role, message.content) for message in hh.prompt.messages]
    assert contents == [("user", "Hi,\n\nsee: Human: x"), ("assistant", "What?"), ("user", "Go")]
    [text] = read_records(written(tmp_path, [{"prompt": "P", "chosen": "C", "rejected": "R"}]))
    assert isinstance(text, Pair) and chosen(text) == ("C", "R")
    assert text.prompt.messages == (Message("user", "P"),)


def test_conversations_are_prompts_or_responses_by_who_speaks_last(tmp_path: Path) -> None:
    answered = [*ASKED, turn("assistant", "Blue.")]
    rows = [{"messages": ASKED}, {"messages": answered}, {"messages": ASKED, "id": 7}]
    prompt, response, other = read_records(written(tmp_path, rows), source="here")
    assert isinstance(prompt, Prompt) and isinstance(response, Response)
    assert response.prompt == prompt and response.text == "Blue." and response.source == "here"
    assert isinstance(other, Prompt) and other.id == "7"


def test_side_of_the_chosen_response_is_random(tmp_path: Path) -> None:
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
        (TULU | {"rejected": [ASKED[0], turn("assistant", "No.")]}, "do not answer the same"),
        (TULU | {"rejected": ASKED}, "rejected does not end with an answer"),
        (TULU | {"rejected": [turn("assistant", "No.")]}, "do not answer the same"),
        (TULU | {"chosen": [*ASKED, turn("assistant", None)]}, "must be text, not null"),  # type: ignore[arg-type]
        (TULU | {"chosen": None}, "chosen must be a list of messages or text, not null"),
        (HH | {"rejected": "No."}, "a transcript begins with"),
        (HH | {"rejected": f"{HH['rejected'][:-2]}"}, "the chosen or the rejected response is em"),
        (HH | {"rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, "two turns of Human"),
    ],
)
def test_rows_that_are_no_preferences_are_reported(row: Any, reason: str, tmp_path: Path) -> None:
    [malformed] = read_records(written(tmp_path, [row]))
    assert isinstance(malformed, MalformedRow) and reason in str(malformed)


ANSWERS = {"chosen": [turn("assistant", "C")], "rejected": [turn("assistant", "R")]}
TRANSCRIPT = "\n\nHuman: Two and two?\n\nAssistant: Four.\n\nHuman: Twice that?\n\nAssistant:"
TURNS = (
    Message("user", "Two and two?"), Message("assistant", "Four."), Message("user", "Twice that?")
)  # fmt: skip


def by_lists(messages: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return the messages as a mapping of lists, as Parquet files of datasets store them."""
    return {key: [message[key] for message in messages] for key in ("role", "content")}


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": TRANSCRIPT, "chosen": " C", "rejected": " R"}, TURNS),
        ({"prompt": TRANSCRIPT, "chosen": f"{TRANSCRIPT} C", "rejected": f"{TRANSCRIPT} R"}, TURNS),
        ({"prompt": ASKED, **ANSWERS}, ASKED),
        ({"prompt": ASKED, "chosen": "C", "rejected": "R"}, ASKED),
        ({"prompt": "Q", **ANSWERS}, (Message("user", "Q"),)),
        ({"prompt": ASKED, **{k: [*ASKED, *v] for k, v in ANSWERS.items()}}, ASKED),
        ({key: by_lists([*ASKED, *value]) for key, value in ANSWERS.items()}, ASKED),
        ({"prompt": by_lists(ASKED), **{k: by_lists(v) for k, v in ANSWERS.items()}}, ASKED),
        ({"prompt": "Human: a name?", "chosen": "C", "rejected": "R"},
         (Message("user", "Human: a name?"),)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_prompt_may_be_in_its_own_column(
    suffix: str, row: Any, prompt: Any, tmp_path: Path
) -> None:
    [pair] = read_records(written(tmp_path, [row], suffix))
    assert chosen(pair) == ("C", "R") and isinstance(pair, Pair)
    expected = tuple(Message(**m) if isinstance(m, dict) else m for m in prompt)
    assert pair.prompt.messages == expected


def with_field(**fields: Any) -> list[dict[str, Any]]:
    return [turn("user", "Q"), {**turn("assistant", "A"), **fields}]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": with_field(tool_calls=[{"function": {"name": "f"}}])}, "'tool_calls'"),
        ({"messages": with_field(content=None, function_call={"name": "f"})}, "'function_call'"),
        ({"messages": with_field(reasoning_content="Hm.")}, "'reasoning_content'"),
        ({"messages": with_field(weight=0)}, "'weight'"),
        ({"messages": with_field(train=False)}, "'train'"),
        ({"messages": with_field(content=[{"type": "image_url"}])}, "a list of parts"),
        ({"messages": with_field(content=None)}, "must be text, not null"),
        ({"messages": [turn("critic", "D"), *with_field()]}, "not 'critic'"),
        ({"conversations": [{"from": "human", "value": "Q"},
                            {"from": "function_call", "value": "{}"}]}, "not 'function_call'"),
        ({"messages": [turn("system", "S"), turn("developer", "D")]}, "a system message after"),
        ({"messages": [turn("user", "Q"), turn("system", "S")]}, "a system message after"),
        ({"messages": [turn("system", "S")]}, "no message of the user"),
        ({"messages": [*with_field(), *with_field()[1:], turn("user", "Q")]}, "in a row"),
        ({"messages": with_field(), "tools": [{"name": "f"}]}, "column tools is a part"),
        ({"messages": [turn("system", "T"), *with_field()], "system": "S"}, "different system"),
        ({"messages": with_field(), "system": ["S"]}, "system must be text"),
        ({"messages": by_lists(with_field()) | {"role": ["user"]}}, "different lengths"),
        ({"prompt": TRANSCRIPT + " The", "chosen": " C", "rejected": " R"}, "a part of the answer"),
        ({"prompt": "S" + TRANSCRIPT, "chosen": " C", "rejected": " R"}, "a transcript begins"),
        ({"prompt": TRANSCRIPT, "chosen": " C\n\nHuman: D", "rejected": " R"}, "further turns"),
        ({"prompt": "Q", "chosen": ASKED, "rejected": ASKED}, "prompt is in no message"),
        ({"prompt": ASKED[:1], "chosen": ASKED[2:], "rejected": ASKED[2:]}, "does not begin with"),
        ({"prompt": [*ASKED, turn("assistant", "A")], **ANSWERS}, "in a row"),
        (ULTRA | {"score_chosen": 5}, "score_chosen is below score_rejected"),
        (ULTRA | {"score_chosen": "8/10"}, "must be finite numbers"),
        (ULTRA | {"score_chosen": True}, "must be finite numbers"),
        (ULTRA | {"score_chosen": "5"}, "score_chosen is below score_rejected"),
        (ULTRA | {"tie": "no"}, "tie must be true or false"),
    ],
)  # fmt: skip
def test_value_that_a_record_cannot_store_is_refused_with_its_reason(
    row: Any, reason: str, tmp_path: Path
) -> None:
    [malformed] = read_records(written(tmp_path, [row]))
    assert isinstance(malformed, MalformedRow) and reason in malformed.reason


def test_empty_fields_of_messages_and_rows_take_nothing_from_them(tmp_path: Path) -> None:
    message: dict[str, Any] = {
        **turn("assistant", "A"),
        "tool_calls": [],
        "name": None,
        "reasoning_content": "",
    }
    row = {"messages": [turn("system", ""), turn("user", "Q"), message], "tools": [], "system": ""}
    [response] = read_records(written(tmp_path, [row]))
    assert isinstance(response, Response) and response.text == "A"
    assert response.prompt.messages == (Message("system", ""), Message("user", "Q"))
    for equal in ({"tie": True}, {"tie": "True"}, {"score_chosen": "5.5"}):
        [tie] = read_records(written(tmp_path, [ULTRA | equal]))
        assert isinstance(tie, Pair) and tie.preferred is None


def test_further_columns_become_metadata_and_are_counted(tmp_path: Path) -> None:
    rows = [TULU, TULU | {"chosen_model": None, "chosen": None}, TULU | {"chosen_model": None}]
    file = RecordFile(written(tmp_path, rows))
    first, broken, last = file.read()
    assert file.metadata == {"chosen_model": 1, "rejected_model": 2}
    assert isinstance(broken, MalformedRow)
    assert not isinstance(first, MalformedRow) and isinstance(first.record, Pair)
    assert first.record.prompt.metadata == {"chosen_model": "a", "rejected_model": "b"}
    assert not isinstance(last, MalformedRow) and isinstance(last.record, Pair)
    assert last.record.prompt.metadata == {"rejected_model": "b"}


def test_the_convention_is_that_of_the_first_row_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"cut": \n' + json.dumps(HH))
    malformed, pair = read_records(file)
    assert isinstance(malformed, MalformedRow) and chosen(pair) == ("Ok.", "No")


def test_an_unknown_convention_is_refused_with_its_columns_and_those_that_are_known(
    tmp_path: Path,
) -> None:
    file = written(tmp_path, [{"qestion": "?", "anwser": "!"}])
    with pytest.raises(UserError) as caught:
        list(read_records(file))
    for part in (str(file), "qestion, anwser", "chosen, rejected", "messages", "prompt=qestion"):
        assert part in str(caught.value)


def test_questions_of_arena_hard(tmp_path: Path) -> None:
    row = {"uid": "2edb", "category": "creative_writing", "subcategory": "poetry", "prompt": "Go"}
    [prompt] = read_records(written(tmp_path, [row]))
    metadata = {"subcategory": "poetry"}
    assert prompt == Prompt(
        "2edb", [Message("user", "Go")], "arena-hard/creative_writing", None, metadata
    )
    [bad] = read_records(written(tmp_path, [row | {"prompt": None}]))
    assert isinstance(bad, MalformedRow) and "prompt must be text" in str(bad)
