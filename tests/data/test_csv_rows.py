"""Tests of rows of CSV files against Python's writer, and of malformed rows."""

import csv
import io

import pytest
from hypothesis import given
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


def test_files_without_one_name_for_each_column_are_refused() -> None:
    with pytest.raises(UserError, match="no header"):
        rows_of(b"\n\n")
    with pytest.raises(UserError, match="two columns 'a'"):
        rows_of(b"a,a\n1,2\n")
