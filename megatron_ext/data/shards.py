"""Which files are read, how documents lie in them, and how files are cut into shards.

A shard is a piece of one file that can be read alone: a byte range, a run of Parquet row groups,
or a whole compressed file.
"""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.data.decompression import COMPRESSIONS, is_compressed
from megatron_ext.errors import UserError

FORMATS = ("jsonl", "parquet", "text")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
# SentencePiece needs some fifty bytes of memory for a byte of one document.
MAX_PLAIN_DOCUMENT = 256 << 20


@dataclass(frozen=True)
class TextFormat:
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


def expand_inputs(patterns: list[str], flag: str = "--input") -> list[str]:
    """Return absolute paths of the non-empty files that paths and globs name: in the order given,
    each glob's files sorted, each file once, also where links give it further names.

    Raises:
        UserError: A pattern names nothing, or a directory, or an empty file.
    """
    paths: dict[tuple[int, int], str] = {}
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
            paths.setdefault(file_identity(path), path)
    return list(paths.values())


def file_identity(path: str) -> tuple[int, int]:
    """Return what is the same for all names of a file: device and inode."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def plan_shards(paths: list[str], layout: TextFormat, shard_bytes: int) -> list[Shard]:
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
        elif is_compressed(path):
            shards.append(Shard(path, kind, 0, None, size))
        elif kind == "text" and layout.separator is None:
            if size > MAX_PLAIN_DOCUMENT:
                raise too_large(path)
            shards.append(Shard(path, kind, 0, None, size))
        else:
            for start in range(0, size, shard_bytes):
                stop = min(start + shard_bytes, size)
                shards.append(Shard(path, kind, start, stop, stop - start))
    return shards


def too_large(path: str) -> UserError:
    limit = MAX_PLAIN_DOCUMENT >> 20
    return UserError(
        f"{path} has a document over {limit} MiB: give a --document-separator that parts it"
    )


def format_of_suffix(path: str) -> str:
    """Return the format of a file, decompressed, by its suffix; empty where it is unknown."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    return _SUFFIXES.get(suffixes[-1 - compressed], "") if len(suffixes) > compressed else ""


def _format_of(path: str, layout: TextFormat) -> str:
    kind = format_of_suffix(path) if layout.format == "auto" else layout.format
    if not kind:
        known = f"{', '.join(_SUFFIXES)}, compressed {', '.join(COMPRESSIONS)}"
        raise UserError(f"{path} has no known suffix ({known}): give --format jsonl or text")
    if kind == "parquet" and is_compressed(path):
        raise UserError(f"{path} is a compressed Parquet file: decompress it, Parquet has its own")
    return kind


def open_parquet(path: str) -> Any:
    """A Parquet file, read as a stream: pyarrow's own choice keeps all of a column that it has read
    until the last row."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file, or truncated: {error}") from error


def _parquet_shards(path: str, text_key: str, size: int, shard_bytes: int) -> Iterator[Shard]:
    import pyarrow

    with open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    kinds = [field.type for field in schema if field.name == text_key]
    if not kinds:
        columns = ", ".join(schema.names)
        raise UserError(f"{path} has no column {text_key!r}: set --text-key to one of {columns}")
    if len(kinds) > 1:
        raise UserError(f"{path} has {len(kinds)} columns {text_key!r}: rename all but one")
    [kind] = kinds
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(values) for test in is_text):
        raise UserError(f"{path}: column {text_key!r} holds {kind}, not text: set --text-key")
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    share = size / max(1, sum(rows))
    start = 0
    for group in range(len(rows)):
        held = round(share * sum(rows[start : group + 1]))
        if held >= shard_bytes or group + 1 == len(rows):
            yield Shard(path, "parquet", start, group + 1, held)
            start = group + 1
