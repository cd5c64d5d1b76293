"""Reader of documents in JSONL, Parquet, CSV and plain text files, one shard at a time.

Memory is bounded by the largest document (Parquet: by one batch of rows).
"""

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from megatron_ext.data.csv_rows import csv_rows
from megatron_ext.data.decompression import BROKEN, decompressed
from megatron_ext.data.shards import MAX_PLAIN_DOCUMENT, Shard, TextFormat, open_parquet, too_large
from megatron_ext.errors import UserError


class MalformedRecord(NamedTuple):
    """Line (Parquet: row) of a shard that is not a document, counted from 1, and the reason."""

    line: int
    reason: str


class ShardReader:
    """Iterator over a shard's documents: texts and `MalformedRecord`s.

    Iterating raises a `UserError` if the file turns out to be truncated or broken.

    Attributes:
        lines: Number of lines (Parquet, JSON arrays: rows) of the shard read so far; at the end,
            all that it owns. For CSV, the line on which the current row begins.
        consumed: Bytes of the shard read so far, at most `shard.size`.
    """

    def __init__(self, shard: Shard, layout: TextFormat):
        self.shard, self.layout = shard, layout
        self.lines = self.consumed = 0

    def __iter__(self) -> Iterator[str | MalformedRecord]:
        if self.shard.format == "parquet":
            yield from self._parquet()
            return
        if self.shard.format == "array":
            yield from self._array()
            return
        with open(self.shard.path, "rb") as raw:
            try:
                stream = decompressed(raw)
                if self.shard.format == "jsonl":
                    yield from self._jsonl(raw, stream)
                elif self.shard.format == "csv":
                    yield from self._csv(raw, stream)
                elif self.layout.separator is None:
                    yield from self._whole(stream)
                elif self.layout.separator == "\n":
                    yield from self._lines(raw, stream)
                else:
                    yield from self._separated(raw, stream, self.layout.separator.encode())
            except BROKEN as error:
                raise self._broken(error) from error

    def pieces(self, size: int) -> Iterator[str]:
        """Yield the unchanged text of a plain file in pieces of whole lines.

        Args:
            size: Smallest size of a piece but the last, in bytes.

        Raises:
            UserError: The file is broken or not UTF-8.
        """
        lines: list[bytes] = []
        first, length = 1, 0
        with open(self.shard.path, "rb") as raw:
            try:
                for _, line in self._numbered_lines(raw, decompressed(raw)):
                    lines.append(line)
                    length += len(line)
                    if length >= size:
                        yield self._piece(lines, first)
                        lines, first, length = [], self.lines + 1, 0
            except BROKEN as error:
                raise self._broken(error) from error
        yield self._piece(lines, first)

    def _piece(self, lines: list[bytes], first: int) -> str:
        text = _utf8(b"".join(lines), first)
        if isinstance(text, MalformedRecord):
            raise UserError(
                f"{self.shard.path}, line {text.line}: {text.reason}. Correct or remove this line."
            )
        return text

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.shard.path} is truncated or broken: {error}. Copy it again.")

    def _numbered_lines(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[
        tuple[bool, bytes]
    ]:  # fmt: skip
        """Yield pairs (owned, line): first the lines that begin in the shard, then the rest."""
        start, stop = self.shard.start, self.shard.stop
        position = mark = 0
        if start:
            stream.seek(start - 1)  # a line that begins exactly at start belongs to this shard
            position = start - 1 + len(stream.readline())
        elif stop is not None:
            mark = stream.tell()  # a byte order mark counts as part of the first line
        while line := stream.readline():
            owned = stop is None or position < stop
            position += len(line) + mark
            mark = 0
            self.lines += owned
            done = raw.tell() if stop is None else position - start
            self.consumed = min(done, self.shard.size)
            yield owned, line

    def _jsonl(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[str | MalformedRecord]:
        for owned, line in self._numbered_lines(raw, stream):
            if not owned:
                return
            if not line.isspace():
                yield self._json_text(line)

    def _json_text(self, line: bytes) -> str | MalformedRecord:
        text = _utf8(line, self.lines)
        if isinstance(text, MalformedRecord):
            return text
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return MalformedRecord(self.lines, f"invalid JSON: {error}")
        if not isinstance(record, dict):
            return MalformedRecord(self.lines, "not a JSON object")
        return self._field(record)

    def _array(self) -> Iterator[str | MalformedRecord]:
        from megatron_ext.data.row_files import MalformedRow, read_rows

        for number, row in read_rows(self.shard.path):
            self.lines = number
            if isinstance(row, MalformedRow):
                yield MalformedRecord(number, row.reason)
            else:
                yield self._field(row)
        self.consumed = self.shard.size

    def _field(self, record: dict[str, Any]) -> str | MalformedRecord:
        key = self.layout.text_key
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            return MalformedRecord(self.lines, f"no key {key!r} (--text-key); its keys: {keys}")
        return self._checked(record[key])

    def _csv(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[str | MalformedRecord]:
        for line, row in csv_rows(stream, self.shard.path):
            self.lines = line
            self.consumed = min(raw.tell(), self.shard.size)
            if isinstance(row, str):
                yield MalformedRecord(self.lines, row)
            else:
                yield row[self.layout.text_key]

    def _checked(self, text: object) -> str | MalformedRecord:
        """Return the text if it can be encoded as UTF-8; JSON permits half a surrogate pair."""
        if not isinstance(text, str):
            return MalformedRecord(self.lines, f"{self.layout.text_key!r} is not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            return MalformedRecord(self.lines, "a lone surrogate, not text")
        return text

    def _whole(self, stream: io.BufferedIOBase) -> Iterator[str | MalformedRecord]:
        content = stream.read(MAX_PLAIN_DOCUMENT + 1)
        if len(content) > MAX_PLAIN_DOCUMENT:
            raise too_large(self.shard.path)
        self.lines, self.consumed = 1, self.shard.size
        yield _utf8(content, 1)

    def _lines(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[str | MalformedRecord]:
        for owned, line in self._numbered_lines(raw, stream):
            if not owned:
                return
            yield _utf8(_chomp(line), self.lines)

    def _separated(
        self, raw: BinaryIO, stream: io.BufferedIOBase, separator: bytes
    ) -> Iterator[str | MalformedRecord]:
        """Yield the documents after the separator lines of the shard, and the file's first one."""
        document: list[bytes] | None = [] if self.shard.start == 0 else None
        first, size = 1, 0
        for owned, line in self._numbered_lines(raw, stream):
            if line.rstrip(b"\r\n") == separator:
                if document:
                    yield _utf8(_chomp(b"".join(document)), first)
                if not owned:
                    return
                document, first, size = [], self.lines + 1, 0
            elif document is not None:
                document.append(line)
                size += len(line)
                if size > MAX_PLAIN_DOCUMENT:
                    raise too_large(self.shard.path)
            elif not owned:
                return
        if document:
            yield _utf8(_chomp(b"".join(document)), first)

    def _parquet(self) -> Iterator[str | MalformedRecord]:
        import pyarrow

        shard, key = self.shard, self.layout.text_key
        assert shard.stop is not None
        groups = list(range(shard.start, shard.stop))
        with open_parquet(shard.path) as file:
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            try:
                for batch in file.iter_batches(256, row_groups=groups, columns=[key]):
                    for value in batch.column(0):
                        self.lines += 1
                        self.consumed = shard.size * self.lines // rows
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError as error:
                            yield MalformedRecord(self.lines, f"invalid UTF-8: {error.reason}")
                        else:
                            yield self._checked(text)
            except (pyarrow.ArrowException, OSError) as error:
                raise self._broken(error) from error


def _utf8(content: bytes, first_line: int) -> str | MalformedRecord:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        return MalformedRecord(line, f"invalid UTF-8: {error.reason}")


def _chomp(content: bytes) -> bytes:
    return content.removesuffix(b"\n").removesuffix(b"\r")
