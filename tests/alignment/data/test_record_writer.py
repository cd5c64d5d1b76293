"""Tests of files of records: reading returns what was written, and broken files are refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from alignment.data.dataset_schemas import read_records
from alignment.data.record_writer import RecordWriter
from alignment.records import Message, Outcome, Pair, Prompt, Response, Side, Verdict
from megatron_ext.data.row_files import MalformedRow, read_rows
from megatron_ext.errors import UserError

PROMPT = Prompt("p", [Message("system", "Be brief."), Message("user", "Why?\u2028\n")], "s", "r")
ANSWERED = Prompt("a", PROMPT.messages, "s", None, {"reference": "4", "steps": [1, {"x": None}]})
KINDS: list[list[Any]] = [
    [PROMPT, Prompt("q", [Message("user", "ünï 漢")], "s")],
    [Response("r", PROMPT, "", "m"), Response("q", ANSWERED, "4", "m")],
    [
        Pair("x", PROMPT, "a", "b", Side.SECOND, "s"),
        Pair("y", PROMPT, "a", "b", None, "s"),
        Pair("z", ANSWERED, "a", "b", None, "s", True),
    ],
    [
        Verdict("r", Outcome.SCORE, score=3.5, sample=2, judge="j"),
        Verdict("x", Outcome.PREFERENCE, preferred=Side.FIRST, swapped=True, thinking="hm"),
        Verdict("r", Outcome.FAILED, reason="timed out after 3 s"),
    ],
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("records", KINDS, ids=lambda records: type(records[0]).__name__)
def test_records_come_back(records: list[Any], suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    with RecordWriter(file) as writer:
        for record in records * 400:  # several batches
            writer.write(record)
    assert list(read_records(file)) == records * 400
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(PROMPT.to_row()).encode()))
    assert list(read_records(file)) == [PROMPT]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz is truncated or broken"):
        list(read_records(file))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_unfinished_file_does_not_exist(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    with pytest.raises(KeyError), RecordWriter(file) as writer:
        for _ in range(2000):
            writer.write(PROMPT)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_only_with_the_flag_and_by_a_complete_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("old")
    with pytest.raises(UserError, match="already exists"):
        RecordWriter(file)
    with pytest.raises(UserError, match="cannot contain both a Response and a Prompt"):
        with RecordWriter(file, overwrite=True) as writer:
            writer.write(PROMPT)
            writer.write(Response("r", PROMPT, ""))
    assert file.read_text() == "old"
    with RecordWriter(file, overwrite=True) as writer:
        writer.write(PROMPT)
    assert list(read_records(file)) == [PROMPT]


def test_rows_that_cannot_be_used_are_numbered_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = b'{"messages": [{"role": "user", "content": "hi"}]}'
    lines = [
        good, b"", b"{", b"[]", b'{"messages": NaN}', b'{"a": "\xff"}', b'{"a": "\\ud800"}',
        b'{"messages": []}', b'{"other": 1}', good.replace(b"user", b"me"), b"[" * 100_000,
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    records = list(read_records(file))
    assert isinstance(records[0], Prompt) and len(records) == len(lines) - 1
    messages = [str(record) for record in records[1:] if isinstance(record, MalformedRow)]
    for line, (text, message) in enumerate(
        zip(messages, ["invalid JSON", "not a JSON object", "NaN is not JSON", "invalid JSON",
                   "lone surrogate", "list of messages", "no 'messages'", "role is one of",
                   "invalid JSON"]),
        start=3,
    ):  # fmt: skip
        assert text.startswith(f"row {line}: ") and message in text


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"none cannot be read: No such file"):
        list(read_rows(tmp_path / "none"))
    (tmp_path / "rows.xls").touch()
    with pytest.raises(UserError, match=r"read by its suffix, one of \.jsonl"):
        list(read_rows(tmp_path / "rows.xls"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a readable Parquet file"):
        list(read_rows(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match=r"must end with .jsonl or .parquet"):
        RecordWriter(tmp_path / "rows.csv")
    empty = pyarrow.parquet.ParquetWriter(tmp_path / "e.parquet", pyarrow.schema({"x": "int64"}))
    empty.close()
    with pytest.raises(UserError, match=r"e\.parquet has no rows"):
        list(read_records(tmp_path / "e.parquet"))
