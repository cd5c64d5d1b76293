"""Tests of files of other projects: every schema, named columns, metadata and labels."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment.data.dataset_schemas import RecordFile
from alignment.data.read_options import ReadOptions
from alignment.data.source_row import LabeledRecord
from alignment.record_files import read_all, read_files
from alignment.records import Outcome, Pair, Prompt, Response, Side
from megatron_ext.data.row_files import MalformedRow
from megatron_ext.errors import UserError

RATED = {"prompt": "Q", "response": "A", "meta": {"rating": 3, "by": {"name": "ann"}}}
ULTRAFEEDBACK = {
    "instruction": "Q", "models": ["m", "n"], "completions": [
        {"model": "m", "response": "A", "overall_score": 1, "helpfulness": 9,
         "annotations": {"honesty": {"Rating": "5"}}},
        {"model": "n", "response": "B", "overall_score": 2, "helpfulness": 4,
         "annotations": {"honesty": {"Rating": "3"}}},
    ],
}  # fmt: skip


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shared(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def written(folder: Path, rows: list[Any], name: str = "mine.jsonl") -> Path:
    file = folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(file: Path, *columns: str, labels: tuple[str, ...] = ()) -> list[Any]:
    return list(RecordFile(file, options=ReadOptions.parse(columns, labels)).read())


def plain(record: Any) -> list[tuple[str, str]]:
    """Return roles and texts of the messages, with the answer of a response as the last one."""
    prompt = record if isinstance(record, Prompt) else record.prompt
    messages = [(message.role, message.content) for message in prompt.messages]
    return messages + ([("assistant", record.text)] if isinstance(record, Response) else [])


Q, A = [("user", "Q")], [("user", "Q"), ("assistant", "A")]
S = [("system", "S"), *A]
SHAREGPT = [shared("system", "S"), shared("human", "Q"), shared("gpt", "A")]
OPENAI = [turn("system", "S"), turn("user", "Q"), turn("assistant", "A")]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "Q", "response": "A"}, A),
        ({"prompt": "Q", "completion": "A"}, A),
        ({"question": "Q", "answer": "A"}, A),
        ({"Question": "Q", "Answer": "A"}, A),
        ({"problem": "Q", "solution": "A", "answer": "4"}, A),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, S),
        ({"system": "S", "prompt": "Q", "response": "A"}, S),
        ({"instruction": "Q", "input": "", "output": "A"}, A),
        ({"instruction": "Q", "input": None, "output": "A"}, A),
        ({"instruction": "I", "input": "C", "output": "A"},
         [("user", "I\n\nC"), ("assistant", "A")]),
        ({"instruction": "I", "context": "C", "response": "A", "category": "qa"},
         [("user", "I\n\nC"), ("assistant", "A")]),
        ({"instruction": "Q", "output": "A", "system": "S",
          "history": [["P", "B"]]},
         [("system", "S"), ("user", "P"), ("assistant", "B"), *A]),
        ({"instruction": "JSON?", "input": "x", "output": '[{"a": 1}]'},
         [("user", "JSON?\n\nx"), ("assistant", '[{"a": 1}]')]),
        ({"conversations": SHAREGPT}, S),
        ({"conversations": SHAREGPT[1:], "system": "S"}, S),
        ({"conversation": OPENAI}, S),
        ({"messages": OPENAI}, S),
        ({"messages": [turn("developer", "S"), *OPENAI[1:]]}, S),
        ({"messages": json.dumps(OPENAI)}, S),
        ({"messages": [{"role": role, "content": [{"type": "text", "text": text}]}
                       for role, text in A]}, A),
        ({"conversations": [shared("human", "Q"), shared("gpt", "B"),
                            shared("observation", "T"), shared("gpt", "A")]},
         [("user", "Q"), ("assistant", "B"), ("tool", "T"), ("assistant", "A")]),
        ({"prompt": OPENAI[:2], "completion": OPENAI[2:]}, S),
        ({"prompt": OPENAI[:2], "completion": "A"}, S),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "response": " A"}, A),
        ({"messages": "\n\nHuman: Q\n\nAssistant: A"}, A),
        ({"input": "Q", "output": "A"}, A),
        ({"question": "Q", "context": "C", "answer": "A"}, A),
        ({"prompt": "Q"}, Q),
        ({"prompt": OPENAI[:2]}, S[:2]),
        ({"question": "Q", "level": 3}, Q),
        ({"conversations": SHAREGPT[:2]}, S[:2]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
def test_prompts_responses_and_conversations(
    row: Any, expected: list[tuple[str, str]], name: str, tmp_path: Path
) -> None:
    [item] = read(written(tmp_path, [row], name))
    assert isinstance(item, LabeledRecord), str(item)
    assert plain(item.record) == expected


@pytest.mark.parametrize(
    "row, preferred",
    [
        ({"response_a": "x", "response_b": "y", "winner": "model_a"}, Side.FIRST),
        ({"response_a": "x", "response_b": "y", "winner": "B"}, Side.SECOND),
        ({"response_a": "x", "response_b": "y", "winner": "tie (bothbad)"}, None),
        ({"response_0": "x", "response_1": "y", "better_response_id": 1}, Side.SECOND),
        ({"response1": "x", "response2": "y", "preference": 1}, Side.FIRST),
        ({"response1": "x", "response2": "y", "preference": 2.0}, Side.SECOND),
        ({"first": "x", "second": "y", "label": "first"}, Side.FIRST),
        ({"first": "x", "second": "y", "label": "TIE"}, None),
        ({"answer_left": "x", "answer_right": "y", "winner": "right"}, Side.SECOND),
    ],
)
def test_labels_of_pairs_name_the_side(row: Any, preferred: Side | None, tmp_path: Path) -> None:
    [item] = read(written(tmp_path, [{"prompt": "Q", **row}]))
    pair = item.record
    assert (pair.first, pair.second, pair.preferred) == ("x", "y", preferred)
    assert pair.tied == (preferred is None) and len(item.labels) == 1
    [bare] = read(written(tmp_path, [{"prompt": "Q", **dict(list(row.items())[:2])}]))
    assert bare.record.preferred is None and not bare.record.tied and not bare.labels


def test_conversations_of_the_arena_are_pairs(tmp_path: Path) -> None:
    row = {
        "question_id": "q7", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "ann",
        "conversation_a": OPENAI[1:], "conversation_b": [OPENAI[1], turn("assistant", "B")],
    }  # fmt: skip
    [item] = read(written(tmp_path, [row]))
    assert (item.record.first, item.record.second) == ("A", "B")
    assert [(x.preferred, x.annotator) for x in item.labels] == [(Side.SECOND, "ann")]
    assert item.record.prompt.metadata == {"question_id": "q7", "model_a": "m", "model_b": "n"}


def test_preferences_of_openai_have_their_messages_in_the_input(tmp_path: Path) -> None:
    row = {
        "input": {"messages": OPENAI[:2], "tools": []},
        "preferred_output": OPENAI[2:], "non_preferred_output": [turn("assistant", "B")],
    }  # fmt: skip
    [item] = read(written(tmp_path, [row]))
    pair = item.record
    assert plain(pair) == S[:2] and {pair.first, pair.second} == {"A", "B"}
    assert (pair.first if pair.preferred is Side.FIRST else pair.second) == "A"


def test_values_of_labels_can_be_stated(tmp_path: Path) -> None:
    rows = [{"history": "Q", "ref_A": "x", "ref_B": "y", "labels": n} for n in (1, 0, -1)]
    columns = ("prompt=history", "first=ref_A", "second=ref_B", "label=labels")
    file = written(tmp_path, rows)
    for unknown, number in zip(read(file, *columns), (1, 0, -1)):
        assert isinstance(unknown, MalformedRow)
        assert f"the label {number} in label is neither A nor B nor a tie" in str(unknown)
    named = read(file, *columns, labels=("first=1", "second=0", "tie=-1"))
    assert [item.record.preferred for item in named] == [Side.FIRST, Side.SECOND, None]


def test_several_annotators_of_an_item_are_labels_of_one_record(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "response_a": "x", "response_b": "y", "winner": winner, "annotator": name}
        for winner, name in (("a", "ann"), ("tie", "bob"), ("b", "cyd"))
    ]
    from alignment.record_files import read_labeled

    [item] = read_labeled([str(written(tmp_path, rows))], Response, Pair)
    assert [(x.outcome, x.annotator) for x in item.labels] == [
        (Outcome.PREFERENCE, "ann"), (Outcome.TIE, "bob"), (Outcome.PREFERENCE, "cyd"),
    ]  # fmt: skip
    assert isinstance(item.record, Pair) and item.record.preferred is None
    wide = [{"prompt": "Q", "response": "A", "ann": 4, "bob": None, "cyd": 2}]
    options = ReadOptions.parse(("score=ann,bob,cyd",))
    [rated] = read_labeled([str(written(tmp_path, wide))], Response, options=options)
    assert [(x.score, x.annotator) for x in rated.labels] == [(4, "ann"), (2, "cyd")]
    assert isinstance(rated.record, Response) and rated.record.prompt.metadata == {}


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "mine.parquet"])
@pytest.mark.parametrize("column", ["conversations", "messages", "prompt"])
def test_preferences_of_sharegpt_have_one_message_each(
    name: str, column: str, tmp_path: Path
) -> None:
    row = {
        column: SHAREGPT[:2], "chosen": shared("gpt", "x"), "rejected": shared("gpt", "y"),
        "topic": "t",
    }  # fmt: skip
    [item] = read(written(tmp_path, [row], name))
    pair = item.record
    assert [(m.role, m.content) for m in pair.prompt.messages] == S[:2]
    assert (pair.first, pair.second, pair.preferred) == ("x", "y", Side.FIRST)
    assert pair.prompt.metadata == {"topic": "t"}
    # A conversation that ends with an answer is no prompt.
    whole = {
        "messages": SHAREGPT,
        "chosen": SHAREGPT,
        "rejected": [*SHAREGPT[:2], shared("gpt", "y")],
    }
    [item] = read(written(tmp_path, [whole], name))
    assert [m.content for m in item.record.prompt.messages] == ["S", "Q"]


def test_chosen_and_rejected_by_annotators_who_disagree_are_one_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": a, "rejected": b, "annotator": name}
        for a, b, name in (("x", "y", "ann"), ("y", "x", "bob"))
    ]
    first, second = read(written(tmp_path, rows))
    assert first.record == second.record and first.record.preferred is None
    assert first.labels[0].preferred is second.labels[0].preferred.other


def test_named_prompt_is_read_next_to_a_conversation(tmp_path: Path) -> None:
    [item] = read(written(tmp_path, [{"title": "Q", "messages": OPENAI}]), "prompt=title")
    assert plain(item.record) == Q


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"Instruction": "I", "Input": "C", "Output": "A"}, ()),
        ({"task": "I", "more": "C", "out": "A"}, ("prompt=task", "input=more", "response=out")),
    ],
)
def test_input_follows_the_instruction(row: Any, columns: tuple[str, ...], tmp_path: Path) -> None:
    [item] = read(written(tmp_path, [row]), *columns)
    assert plain(item.record) == [("user", "I\n\nC"), ("assistant", "A")]


def test_columns_are_named_by_their_roles(tmp_path: Path) -> None:
    rows = [{"Frage": "Q", "meta": {"reply": "A", "n": 1}, "gold": "4", "id": 7}]
    file = written(tmp_path, rows, "mine.parquet")
    [item] = read(file, "prompt=Frage", "response=meta.reply", "reference=gold", "group=id")
    assert plain(item.record) == A
    assert item.record.prompt.metadata == {
        "reference": "4", "group": 7, "meta": {"reply": "A", "n": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    "row, columns, message",
    [
        ({"qestion": "Q", "anwser": "A"}, (), r"columns qestion, anwser.*prompt=qestion"),
        ({"question": "Q"}, ("response=answr",), r"no column 'answr'; its columns are question"),
        ({"question": "Q", "answer": "A"}, ("response=answr",), r"Did you mean answer\?"),
        ({"prompt": "P", "question": "Q", "answer": "A"}, (),
         r"columns prompt and question, each of which may be the prompt.*prompt=prompt"),
        ({"prompt": "P", "response": "A", "completion": "B"}, (), "may be the response"),
        ({"prompt": "P"}, ("prompt",), "must have the form OURS=THEIRS"),
        ({"frage": "Q"}, ("promt=frage",), r"Name them with --columns prompt=frage\."),
        (RATED, ("score=meta.raitng",),
         r"no field 'raitng' in the column meta; its fields are rating, by\..*mean meta\.rating\?"),
        (RATED, ("score=mta.rating",), r"no column 'mta\.rating'.*Did you mean meta\.rating\?"),
        (RATED, ("score=meta.by.nme",), r"'nme' in the column meta\.by;.*mean meta\.by\.name\?"),
        (RATED, ("score=prompt.rating",), r"no fields in the column prompt\. Name the column"),
        (RATED, ("score=meta.rating,meta.ratin",), "Did you mean meta.rating"),
        (RATED, ("score=meta.rating", "label=meta.by"), "both name the ratings"),
        (ULTRAFEEDBACK, ("score=completions.nonsense",),
         "no field 'nonsense' in the column completions; its fields are model, response, "),
        (ULTRAFEEDBACK, ("score=completions.helpfulnes",), r"mean completions\.helpfulness\?"),
        (ULTRAFEEDBACK, ("label=models",), "completions.*which have no label.*score, annotator"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "n": 1}, ("score=n",), "have no score"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "n": 1}, ("label=n",), "have no label"),
        ({"prompt": "Q", "answer_a": "A", "answer_b": "B", "n": 1}, ("score=n",), "have no score"),
        ({"prompt": "Q", "n": 1}, ("score=n",), "read as prompts .* have no score"),
        ({"prompt": "Q", "n": "C", "answer": "A"}, ("input=n",), "have no input"),
        ({"uid": "1", "category": "c", "subcategory": "d", "prompt": "Q", "n": 1}, ("rubric=n",),
         "have no rubric"),
    ],
)  # fmt: skip
def test_columns_that_are_missing_or_ambiguous_are_refused(
    row: Any, columns: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, [row]), *columns)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "", "response": "A"}, "prompt is empty"),
        ({"prompt": "Q", "response": " "}, "response is empty"),
        ({"prompt": "Q", "response": 7}, "response must be a list of messages, not int"),
        ({"instruction": None, "input": "x", "output": "A"}, "instruction is empty"),
        ({"conversations": []}, "must be a list of messages, not empty"),
        ({"conversations": [shared("system", "S"), shared("system", "T"), shared("human", "Q")]},
         "a system message after its first message"),
        ({"conversations": [shared("human", "Q"), shared("gpt", "A"), shared("gpt", "B")]},
         "two messages of the assistant in a row"),
        ({"conversations": [shared("narrator", "Q")]}, "not 'narrator'"),
        ({"messages": '[{"role": "user"'}, "begins like a list, but is not JSON"),
        ({"prompt": "Q", "response": "A", "tools": [{"name": "f"}]}, "column tools is a part"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_say_why(row: Any, reason: str, tmp_path: Path) -> None:
    valid: dict[str, Any] = {
        "conversations": SHAREGPT, "messages": OPENAI, "prompt": "Q", "response": "A",
        "instruction": "Q", "input": "", "output": "A",
    }  # fmt: skip
    good = {name: valid[name] for name in row if name in valid}
    items = read(written(tmp_path, [good, row]))
    assert isinstance(items[1], MalformedRow) and items[1].number == 2
    assert reason in items[1].reason


@pytest.mark.parametrize(
    "row, part",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "the chosen or the rejected response"),
        ({"prompt": "Q", "chosen": "   ", "rejected": "B"}, "the chosen or the rejected response"),
        ({"prompt": "Q", "chosen": [turn("assistant", "A")], "rejected": [turn("assistant", "")]},
         "the chosen or the rejected response"),
        ({"prompt": "Q", "answer_a": "A", "answer_b": "\n"}, "the first or the second response"),
        ({"prompt": "Q", "response": [turn("assistant", " ")]}, "the response"),
        ({"prompt": "Q", "completions": [{"response": " "}]}, "the response"),
        ({"messages": [turn("user", "Q"), turn("assistant", "")]}, "the response"),
        ({"messages": "\n\nHuman: \n\nAssistant: A"}, "the prompt"),
        ({"messages": [turn("system", "S"), turn("user", "")]}, "the prompt"),
        ({"prompt": [turn("user", "")], "response": "A"}, "the prompt"),
        ({"prompt": " \t", "response": "A"}, "the prompt"),
        ({"prompt": "  ", "chosen": "A", "rejected": "B"}, "the prompt"),
        ({"prompt": "  "}, "the prompt"),
        ({"uid": "1", "category": "c", "subcategory": "d", "prompt": ""}, "the prompt"),
    ],
)  # fmt: skip
def test_empty_texts_are_refused_in_every_schema(row: Any, part: str, tmp_path: Path) -> None:
    [item] = read(written(tmp_path, [row]))
    assert isinstance(item, MalformedRow) and item.reason == f"{part} is empty"


def test_tool_that_printed_nothing_is_no_empty_prompt(tmp_path: Path) -> None:
    messages = [turn("user", "Q"), turn("assistant", "B"), turn("tool", ""), turn("assistant", "A")]
    [item] = read(written(tmp_path, [{"messages": messages}]))
    assert item.record.text == "A"


def test_mixed_schemas_in_one_file_are_named_by_row(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "Q", "response": "A"}, {"messages": OPENAI}])
    with pytest.raises(UserError, match=r"mine\.jsonl, row 2: no 'prompt', which the rows before"):
        read_all(file, Response)


def test_conversation_that_ends_with_the_user_is_no_response(tmp_path: Path) -> None:
    file = written(tmp_path, [{"messages": OPENAI}, {"messages": OPENAI[:2]}])
    reason = r"row 2: there is no answer of the assistant after the messages of system, user, and"
    with pytest.raises(UserError, match=reason):
        read_all(file, Response)
    assert [plain(prompt) for prompt in read_all(file, Prompt)] == [S[:2]]  # the same prompt twice


@pytest.mark.parametrize(
    "more, advice",
    [({"explanation": "A"}, "explanation"), ({"hint": "B", "explanation": "A"}, "COLUMN")],
)
def test_row_without_a_known_answer_names_the_columns(
    more: dict[str, str], advice: str, tmp_path: Path
) -> None:
    row = {"question": "Q", **more}
    file = written(tmp_path, [row])
    with pytest.raises(UserError) as caught:
        read_all(file, Response)
    assert str(caught.value) == (
        f"{file}, row 1: there is no answer of the assistant in the columns {', '.join(row)}, and "
        f"the command reads responses. Name the column of the answer with --columns "
        f"response={advice}."
    )


def test_answers_of_rows_that_are_read_as_prompts_are_references(tmp_path: Path) -> None:
    [prompt] = read_all(written(tmp_path, [{"question": "Q", "answer": "4", "n": 1}]), Prompt)
    assert prompt.metadata == {"reference": "4", "answer": "4", "n": 1}
    [record] = read_all(
        written(tmp_path, [{"question": "Q", "answer": "4", "reference": "four"}]), Prompt
    )
    assert record.metadata == {"reference": "four", "answer": "4"}


def test_a_limit_counts_records_of_all_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        written(tmp_path, [{"question": f"{f}{n}", "answer": "A"} for n in (1, 2, 1)], f"{f}.jsonl")
        for f in "ab"
    ]
    options = ReadOptions.parse((), (), 3)
    prompts = read_files([str(file) for file in files], Prompt, options=options)
    assert [prompt.messages[0].content for prompt in prompts] == ["a1", "a2", "b1"]
    printed = capsys.readouterr().out
    assert (
        "a.jsonl as prompts and responses (prompt=question, response=answer): 2 records" in printed
    )
    assert "1 more rows repeat one of them" in printed
    with pytest.raises(UserError, match="an earlier row with other texts has the id '5' too"):
        read_all(written(tmp_path, [{"id": 5, "prompt": str(n)} for n in range(2)]), Prompt)
