"""Reader of CSV and TSV files: a header, quoted fields, and newlines within quotes (RFC 4180)."""

import csv
import io
from collections.abc import Iterator
from typing import Any, TextIO

from megatron_ext.errors import UserError

_DELIMITERS = ",\t;|"
_LONGEST_FIELD = 256 << 20  # characters, as in a document of plain text


def csv_rows(stream: io.BufferedIOBase, path: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the rows of a CSV file below its header.

    The delimiter is the one of comma, tab, semicolon and vertical bar that occurs most often in
    the header, outside of quotes. Empty lines are skipped.

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
        first = 1 + reader.line_num
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = "unexpected end" in str(error)
                yield (
                    first,
                    "a quote that is never closed" if open_quote else f"invalid CSV: {error}",
                )
            else:
                if fields:
                    yield first, _row(header, fields)
            first = 1 + reader.line_num
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

    def __init__(self, text: TextIO, delimiter: str, lines_before: int) -> None:
        self._reader = csv.reader(text, delimiter=delimiter, strict=True)
        self._lines_before = lines_before

    @property
    def line_num(self) -> int:
        """Number of lines read so far."""
        return self._lines_before + self._reader.line_num

    def __next__(self) -> list[str]:
        return next(self._reader)


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
    return _Reader(text, delimiter, len(lines)), names


def _row(header: list[str], fields: list[str]) -> dict[str, str] | str:
    if len(fields) != len(header):
        return f"{len(fields)} fields, but the header has {len(header)}"
    row = dict(zip(header, fields))
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return "invalid UTF-8; convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8"
    return row
