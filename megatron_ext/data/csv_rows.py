"""Reader of CSV and TSV files: a header, quoted fields, and newlines within quotes (RFC 4180)."""

import csv
import io
from collections.abc import Iterator
from typing import Any, TextIO

from megatron_ext.errors import UserError

_DELIMITERS = ",\t;|"
_LONGEST_FIELD = 256 << 20  # characters, as in a document of plain text
_ROW_SHARE = 0.9  # of the lines that quotes join, from which they are rows with literal quotes


def csv_rows(stream: io.BufferedIOBase, path: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the rows of a CSV file below its header.

    The delimiter is the one of comma, tab, semicolon and vertical bar that occurs most often in
    the header, outside of quotes. Empty lines are skipped.

    Many programs write tabs without quoting, so that a quote may begin a text that never ends it.
    Lines that quotes join, or that break the rules of quoting, are therefore rows with literal
    quotes if the delimiter is a tab and they all look like rows.

    Args:
        stream: Plain bytes of the file, in UTF-8 and without a byte order mark.
        path: Name of the file, for error messages.

    Yields:
        The line on which the row begins, counted from 1, and the row by column, or the reason why
        it is malformed: another number of fields than the header, broken quotes or invalid UTF-8.

    Raises:
        UserError: The file has no header, or two columns have the same name.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    text = _decoded(stream)
    try:
        reader, header = _header(text, path)
        for first, fields in reader.records():
            yield first, fields if isinstance(fields, str) else _row(header, fields)
    finally:
        text.detach()


def csv_columns(stream: io.BufferedIOBase, path: str) -> list[str]:
    """Return the columns of a CSV file; see `csv_rows`."""
    text = _decoded(stream)
    try:
        return _header(text, path)[1]
    finally:
        text.detach()


def _decoded(stream: Any) -> io.TextIOWrapper:
    # Lone surrogates stand for invalid bytes, so that a row can be reported and reading continues.
    return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")


class _Reader:
    """CSV reader that counts lines from the beginning of the file."""

    def __init__(self, text: TextIO, delimiter: str, columns: int, lines_before: int) -> None:
        self._text, self._columns, self._has_tabs = text, columns, delimiter == "\t"
        self._reader = csv.reader(self._counted(), delimiter=delimiter, strict=True)
        self._line_num = lines_before
        self._record: list[str] = []  # lines of the present record, if the delimiter is a tab

    def records(self) -> Iterator[tuple[int, list[str] | str]]:
        """Yield the first line of each record, and its fields or the reason why it is malformed."""
        while True:
            self._record.clear()
            first = 1 + self._line_num
            fields: list[str] | str
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = "unexpected end" in str(error)
                fields = "a quote that is never closed" if open_quote else f"invalid CSV: {error}"
            literal = self._literal() if isinstance(fields, str) or len(self._record) > 1 else []
            records: list[list[str] | str] = [*literal] or [fields]
            for number, record in enumerate(records, start=first):
                if record:
                    yield number, record

    def _counted(self) -> Iterator[str]:
        for line in self._text:
            self._line_num += 1
            if self._has_tabs:
                self._record.append(line)
            yield line

    def _literal(self) -> list[list[str]]:
        """Return the fields of each line if the lines of the record are rows with literal quotes.

        Lines within quotes rarely have the columns of the header. Few others may be malformed rows.
        """
        lines = [line.rstrip("\r\n") for line in self._record]
        rows = [line.split("\t") if line else [] for line in lines]
        alike = sum(len(row) == self._columns and bool(row[0]) for row in rows)
        return rows if alike >= _ROW_SHARE * len(rows) else []


def _header(text: TextIO, path: str) -> tuple[_Reader, list[str]]:
    """Return a reader of the rows below the header, and the names of the columns."""
    lines = []
    for line in text:
        lines.append(line)
        record = "".join(lines)
        if record.count('"') % 2 == 0 and record.strip():
            break
    record = "".join(lines)
    unquoted = "".join(record.split('"')[::2])
    delimiter = max(_DELIMITERS, key=unquoted.count)
    try:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next((row for row in rows if row), None)
    except csv.Error as error:
        raise UserError(
            f"{path} has no valid header: {error}. Write the names of the columns on its first "
            "line."
        ) from error
    if header is None:
        raise UserError(f"{path} has no header. Write the names of the columns on its first line.")
    names = [name.strip() for name in header]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}. Rename one of them.")
    return _Reader(text, delimiter, len(names), len(lines)), names


def _row(header: list[str], fields: list[str]) -> dict[str, str] | str:
    if len(fields) != len(header):
        return f"{len(fields)} fields, but the header has {len(header)}"
    row = dict(zip(header, fields))
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return "invalid UTF-8; convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8"
    return row
