"""Tests of rows of CSV files against Python's writer, and of malformed rows."""

import csv
import io

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.data.csv_rows import csv_columns, csv_rows
from megatron_ext.errors import UserError

FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def rows_of(content: bytes) -> list[tuple[int, dict[str, str] | str]]:
    return list(csv_rows(io.BytesIO(content), "file.csv"))


@given(
    st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_rows_that_python_writes_are_read_as_they_were(rows, delimiter, newline):
    # Quoted lines that have the columns of the header are rows of a file without quoting.
    assume(delimiter != "\t" or not any("\t" in "".join(row) for row in rows))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    header = ["id", "the text", "a, b; c"]
    writer.writerows([header, *rows])
    content = text.getvalue().encode()
    assert csv_columns(io.BytesIO(content), "file.csv") == header
    assert [row for _, row in rows_of(content)] == [dict(zip(header, row)) for row in rows]


def test_rows_have_the_line_on_which_they_begin() -> None:
    content = b'a;b\r\n"two\r\nlines";1\r\n\r\n"a ""quote""";2\n4;5;6\nx;\xff\n"open;7\n8;9\n'
    rows = rows_of(content)
    assert str(rows[3][1]).startswith("invalid UTF-8; convert the file")
    rows[3] = (7, "invalid UTF-8")
    assert rows == [
        (2, {"a": "two\r\nlines", "b": "1"}),
        (5, {"a": 'a "quote"', "b": "2"}),
        (6, "3 fields, but the header has 2"),
        (7, "invalid UTF-8"),
        (8, "a quote that is never closed"),
    ]


def test_reading_continues_after_broken_quotes() -> None:
    reason, row = rows_of(b'a,b\n"x" y,1\n2,3\n')
    assert reason[0] == 2 and str(reason[1]).startswith("invalid CSV: ")
    assert row == (3, {"a": "2", "b": "3"})


WITHOUT_QUOTING = """id\ttext
1\tplain one
2\t"Hello," she said.
3\t"Once upon a time
4\tfour
5\tthe end"
6\tsix
7\t"It never ends
8\teight
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_quotes_are_literal_in_lines_of_tabs_that_look_like_rows(newline: str) -> None:
    lines = WITHOUT_QUOTING.splitlines()
    rows = rows_of(newline.join(lines).encode())
    expected = [dict(zip(("id", "text"), line.split("\t"))) for line in lines[1:]]
    assert rows == list(enumerate(expected, start=2))


def test_quoted_lines_of_tabs_are_one_text_unless_they_look_like_rows() -> None:
    texts = ["two\nlines", "a\tcell\nb", 'a "quote"', "def f():\n\treturn 1", "a\n\nb\tc\nd"]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([("id", "text"), *enumerate(texts)])
    rows = rows_of(text.getvalue().encode())
    assert [row for _, row in rows] == [{"id": str(i), "text": t} for i, t in enumerate(texts)]


def test_a_malformed_line_between_literal_quotes_is_reported_alone() -> None:
    texts = ['"The first', *(f"line {i}" for i in range(1, 29)), 'the last"']
    lines = ["id\ttext", *(f"{i}\t{text}" for i, text in enumerate(texts))]
    lines[20] = "19"
    rows = rows_of("\n".join(lines).encode())
    assert rows[19] == (21, "1 fields, but the header has 2")
    expected = [{"id": str(i), "text": text} for i, text in enumerate(texts) if i != 19]
    assert [row for number, row in rows if number != 21] == expected


def test_files_without_one_name_for_each_column_are_refused() -> None:
    with pytest.raises(UserError, match="no header"):
        rows_of(b"\n\n")
    with pytest.raises(UserError, match="two columns 'a'"):
        rows_of(b"a,a\n1,2\n")
