"""Tests of files of rows: formats, encodings, folders, and broken files."""

import bz2
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.data.row_files import MalformedRow, expand_row_files, read_rows
from megatron_ext.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": 'What is "red", or\nblue?', "answer": "A colour; of light"},
    {"question": "漢字?", "answer": "a,b\tc"},
    {"question": " spaces ", "answer": None},
]


def rows_of(file: Path) -> list[Any]:
    return [row for _, row in read_rows(file)]


def as_csv(delimiter: str = ",", end: str = "\n") -> bytes:
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.json", LINES),
        ("rows.json", ARRAY),
        ("rows.jsonl", ARRAY),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}, indent=2).encode()),
        ("rows.json", json.dumps({"data": ROWS}).encode()),
        ("rows.csv", as_csv()),
        ("rows.csv", as_csv(end="\r\n")),
        ("rows.csv", b"\xef\xbb\xbf" + as_csv(";", "\r\n")),
        ("rows.tsv", as_csv("\t")),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.csv.zst", zstandard.compress(as_csv())),
        ("rows.json.bz2", bz2.compress(ARRAY)),
        ("ROWS.CSV", as_csv()),
    ],
)
def test_same_rows_come_from_every_format(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == ROWS


def test_parquet_rows_keep_nested_values(tmp_path: Path) -> None:
    nested = [{"meta": {"question": "Why?", "tags": ["a"]}, "turns": [{"role": "user"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "n.parquet")
    assert rows_of(tmp_path / "n.parquet") == nested


def test_lines_of_one_column_are_not_taken_for_a_document(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows_of(file) == lines
    file.write_text(json.dumps(lines[0], indent=1))
    assert rows_of(file) == lines[:1]


def test_pandas_index_column_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(",question\n0,Why?\n1,When?\n")
    assert rows_of(tmp_path / "p.csv") == [{"question": "Why?"}, {"question": "When?"}]


def test_rows_of_csv_with_too_many_cells_are_named_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('a,b\n"1\n2",3\n4,5,6\n7,8\n')
    first, broken, last = rows_of(tmp_path / "p.csv")
    assert (first, last) == ({"a": "1\n2", "b": "3"}, {"a": "7", "b": "8"})
    assert isinstance(broken, MalformedRow)
    assert str(broken) == "row 4: 3 fields, but the header has 2"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("r.csv", "a,b\n1,é\n".encode("utf-16"), r"r\.csv is UTF-16 text\. Convert it"),
        ("r.csv", b"a,a\n1,2\n", r"r\.csv has two columns 'a'"),
        ("r.csv", b"\n\n", r"r\.csv has no header"),
        ("r.json", b'[{"a": 1},\n{"a": ]', r"r\.json is not valid JSON: .*Correct the file"),
        ("r.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', r"several arrays of rows"),
        ("r.xlsx", b"PK", r"r\.xlsx is read by its suffix"),
        ("r.parquet", b"PAR1", r"r\.parquet is not a readable Parquet file"),
        ("r.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"r\.jsonl\.gz is truncated or broken"),
    ],
)
def test_broken_files_are_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name)


def test_folders_list_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b/train-1.jsonl", "a/train-0.jsonl", ".cache/x.jsonl", "info.json", "README.md"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(LINES)
    names = [str(Path(path).relative_to(tmp_path)) for path in expand_row_files([str(tmp_path)])]
    assert names == ["a/train-0.jsonl", "b/train-1.jsonl"]
    (tmp_path / "test-0.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=r"files of several splits \(test, train\)"):
        expand_row_files([str(tmp_path)])
    (tmp_path / "test-0.jsonl").rename(tmp_path / "more.csv")
    with pytest.raises(UserError, match="files of several formats"):
        expand_row_files([str(tmp_path)])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty has no file that ends with \.jsonl"):
        expand_row_files([str(empty)])
