"""Documents read from JSONL, Parquet and plain text files, as a stream and a shard at a time.

A shard is a piece of one file that can be read alone: a byte range, a run of Parquet row groups,
or a whole compressed file. Memory is bounded by the largest document (Parquet: by one batch).
"""

import glob
import gzip
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_ext.errors import UserError

FORMATS = ("jsonl", "parquet", "text")
COMPRESSIONS = (".gz", ".zst")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
# SentencePiece needs some fifty bytes of memory for a byte of one document.
MAX_PLAIN_DOCUMENT = 256 << 20


@dataclass(frozen=True)
class Layout:
    """How documents lie in the files.

    format: "auto" goes by the file's suffix, or one of `FORMATS`.
    text_key: the field (JSONL) or column (Parquet) that holds the text.
    separator: plain text: a line equal to it ends a document ("" is a blank line); a line break:
        every line is a document; None: a whole file is one document.
    """

    format: str = "auto"
    text_key: str = "text"
    separator: str | None = None


class Shard(NamedTuple):
    """A piece of a file: bytes (JSONL, text) or row groups (Parquet) from `start` up to `stop`.

    `stop` is None where the whole file is read. `size` is its share of the file, in bytes.
    """

    path: str
    format: str
    start: int
    stop: int | None
    size: int


class Malformed(NamedTuple):
    """A line (Parquet: row) that gives no document, counted from 1 within its shard, and why."""

    line: int
    reason: str


def expand_inputs(patterns: list[str], flag: str = "--input") -> list[str]:
    """Absolute paths of the non-empty files that paths and globs name: in the order given, each
    glob's files sorted, each file once.

    Raises:
        UserError: a pattern names nothing, or a directory, or an empty file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise UserError(f"{flag} {pattern} is a directory: name its files, {pattern}/*.jsonl")
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [os.path.abspath(path) for path in found if os.path.isfile(path)]
        if not found:
            problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise UserError(f"{flag} {pattern} {problem}")
        for path in found:
            if os.path.getsize(path) == 0:
                raise UserError(f"{flag} {path} is empty: leave it out")
            paths[path] = None
    return list(paths)


def plan_shards(paths: list[str], layout: Layout, shard_bytes: int) -> list[Shard]:
    """Cut files into shards of about `shard_bytes`; the same files always give the same shards.

    Raises:
        UserError: a format that cannot be told, a broken Parquet file or one without the text
            column, a file too large to be one document.
    """
    shards: list[Shard] = []
    for path in paths:
        kind, size = _format_of(path, layout), os.path.getsize(path)
        if kind == "parquet":
            shards += _parquet_shards(path, layout.text_key, size, shard_bytes)
        elif path.endswith(COMPRESSIONS):
            shards.append(Shard(path, kind, 0, None, size))
        elif kind == "text" and layout.separator is None:
            if size > MAX_PLAIN_DOCUMENT:
                raise _too_large(path)
            shards.append(Shard(path, kind, 0, None, size))
        else:
            for start in range(0, size, shard_bytes):
                stop = min(start + shard_bytes, size)
                shards.append(Shard(path, kind, start, stop, stop - start))
    return shards


def _too_large(path: str) -> UserError:
    limit = MAX_PLAIN_DOCUMENT >> 20
    return UserError(
        f"{path} has a document over {limit} MiB: give a --document-separator that parts it"
    )


def _format_of(path: str, layout: Layout) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-1 - compressed] if len(suffixes) > compressed else ""
    kind = _SUFFIXES.get(suffix, "") if layout.format == "auto" else layout.format
    if not kind:
        raise UserError(f"{path} has no suffix that tells its format: give --format jsonl or text")
    if kind == "parquet" and compressed:
        raise UserError(f"{path} is a compressed Parquet file: decompress it, Parquet has its own")
    return kind


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file, or truncated: {error}") from error


def _parquet_shards(path: str, text_key: str, size: int, shard_bytes: int) -> Iterator[Shard]:
    import pyarrow

    with _open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"{path} has no column {text_key!r}: set --text-key to one of {columns}")
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {text_key!r} holds {kind}, not text: set --text-key")
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    share = size / max(1, sum(rows))
    start = 0
    for group in range(len(rows)):
        held = round(share * sum(rows[start : group + 1]))
        if held >= shard_bytes or group + 1 == len(rows):
            yield Shard(path, "parquet", start, group + 1, held)
            start = group + 1


class ShardReader:
    """Iterates over a shard's documents: the text, or `Malformed`.

    lines: lines (rows) of the shard read so far; after the last one, all that it owns.
    consumed: bytes of the shard read so far, at most `shard.size`.

    Raises:
        UserError: a truncated or broken file, noticed while reading.
    """

    def __init__(self, shard: Shard, layout: Layout):
        self.shard, self.layout = shard, layout
        self.lines = self.consumed = 0

    def __iter__(self) -> Iterator[str | Malformed]:
        if self.shard.format == "parquet":
            yield from self._parquet()
            return
        with open(self.shard.path, "rb") as raw:
            try:
                stream = _decompressed(raw)
                if self.shard.format == "jsonl":
                    yield from self._jsonl(raw, stream)
                elif self.layout.separator is None:
                    yield from self._whole(stream)
                elif self.layout.separator == "\n":
                    yield from self._lines(raw, stream)
                else:
                    yield from self._separated(raw, stream, self.layout.separator.encode())
            except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdBroken) as error:
                raise UserError(f"{self.shard.path} is truncated or broken: {error}") from error

    def _numbered_lines(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[
        tuple[bool, bytes]
    ]:  # fmt: skip
        """(owned, line): a shard owns the lines that begin in it; those after it follow unowned."""
        start, stop = self.shard.start, self.shard.stop
        position = start
        if start:
            stream.seek(start - 1)  # a line that begins exactly at start is ours
            position = start - 1 + len(stream.readline())
        while line := stream.readline():
            owned = stop is None or position < stop
            position += len(line)
            self.lines += owned
            done = raw.tell() if stop is None else position - start
            self.consumed = min(done, self.shard.size)
            yield owned, line

    def _jsonl(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[str | Malformed]:
        for owned, line in self._numbered_lines(raw, stream):
            if not owned:
                return
            if not line.isspace():
                yield self._json_text(line)

    def _json_text(self, line: bytes) -> str | Malformed:
        text = _utf8(line, self.lines)
        if isinstance(text, Malformed):
            return text
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Malformed(self.lines, f"invalid JSON: {error}")
        if not isinstance(record, dict):
            return Malformed(self.lines, "not a JSON object")
        key = self.layout.text_key
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            return Malformed(self.lines, f"no key {key!r} (--text-key); its keys: {keys}")
        return self._checked(record[key])

    def _checked(self, text: object) -> str | Malformed:
        """Text that has a UTF-8 form; JSON can smuggle in half of a surrogate pair."""
        if not isinstance(text, str):
            return Malformed(self.lines, f"{self.layout.text_key!r} holds no text")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Malformed(self.lines, "a lone surrogate, not text")
        return text

    def _whole(self, stream: io.BufferedIOBase) -> Iterator[str | Malformed]:
        content = stream.read(MAX_PLAIN_DOCUMENT + 1)
        if len(content) > MAX_PLAIN_DOCUMENT:
            raise _too_large(self.shard.path)
        self.lines, self.consumed = 1, self.shard.size
        yield _utf8(content, 1)

    def _lines(self, raw: BinaryIO, stream: io.BufferedIOBase) -> Iterator[str | Malformed]:
        for owned, line in self._numbered_lines(raw, stream):
            if not owned:
                return
            yield _utf8(_chomp(line), self.lines)

    def _separated(
        self, raw: BinaryIO, stream: io.BufferedIOBase, separator: bytes
    ) -> Iterator[str | Malformed]:
        """A shard owns the document after each separator line it owns, and the file's first."""
        document: list[bytes] | None = [] if self.shard.start == 0 else None
        first, held = 1, 0
        for owned, line in self._numbered_lines(raw, stream):
            if line.rstrip(b"\r\n") == separator:
                if document:
                    yield _utf8(_chomp(b"".join(document)), first)
                if not owned:
                    return
                document, first, held = [], self.lines + 1, 0
            elif document is not None:
                document.append(line)
                held += len(line)
                if held > MAX_PLAIN_DOCUMENT:
                    raise _too_large(self.shard.path)
            elif not owned:
                return
        if document:
            yield _utf8(_chomp(b"".join(document)), first)

    def _parquet(self) -> Iterator[str | Malformed]:
        import pyarrow

        shard, key = self.shard, self.layout.text_key
        assert shard.stop is not None
        groups = list(range(shard.start, shard.stop))
        with _open_parquet(shard.path) as file:
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            try:
                for batch in file.iter_batches(256, row_groups=groups, columns=[key]):
                    for value in batch.column(0):
                        self.lines += 1
                        self.consumed = shard.size * self.lines // rows
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError as error:
                            yield Malformed(self.lines, f"invalid UTF-8: {error.reason}")
                        else:
                            yield self._checked(text)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{shard.path} is truncated or broken: {error}") from error


def _utf8(content: bytes, first_line: int) -> str | Malformed:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        return Malformed(line, f"invalid UTF-8: {error.reason}")


def _chomp(content: bytes) -> bytes:
    return content.removesuffix(b"\n").removesuffix(b"\r")


def _decompressed(raw: BinaryIO) -> io.BufferedIOBase:
    if raw.name.endswith(".gz"):
        return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=raw))
    if raw.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return cast(io.BufferedIOBase, raw)


class _ZstdBroken(Exception):
    pass


class _ZstdStream(io.RawIOBase):
    """Frames of a .zst file, one after the other. Unlike zstandard's own stream reader it fails
    when the last frame has no end."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            chunk = self._compressed or self._raw.read(1 << 14)
            if not chunk:
                if self._frame is not None:
                    raise _ZstdBroken("the last frame has no end")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = self._frame.decompress(chunk)
            except self._zstandard.ZstdError as error:
                raise _ZstdBroken(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count


class Progress:
    """Bytes of input done, speed and ETA: a bar on a terminal, elsewhere a line every ten seconds.

    Everything goes to stdout; stderr is left to errors.
    """

    INTERVAL = 10.0  # seconds

    def __init__(self, label: str, total: int):
        self.label, self.total = label, max(1, total)
        self._begin = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(),
                progress.DownloadColumn(), progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._task = self._bar.add_task(self.label, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show `done` bytes of the total and a note on what came of them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self.INTERVAL:
            self._last = now
            speed = done / (now - self._begin)
            left = round((self.total - done) / speed) if speed else 0
            print(
                f"{self.label}: {done / self.total:.0%} of {self.total / 1e6:,.1f} MB, "
                f"{speed / 1e6:.1f} MB/s, ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
                f"{', ' + note if note else ''}",
                flush=True,
            )

    def log(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)
