"""Input files of preprocessing, their text format, and their division into shards.

A shard is a piece of one file that can be read independently: a byte range, a run of Parquet row
groups, or a whole compressed or CSV file.
"""

import glob
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.data.columns import missing_column
from megatron_ext.data.csv_rows import csv_columns
from megatron_ext.data.decompression import BROKEN, COMPRESSIONS, decompressed, is_compressed
from megatron_ext.errors import UserError

FORMATS = ("jsonl", "parquet", "csv", "text")
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
# SentencePiece needs about fifty bytes of memory per byte of one document.
MAX_PLAIN_DOCUMENT = 256 << 20
_FIRST_OBJECTS = 16  # of a JSON file, which must not all lack the text


@dataclass(frozen=True)
class TextFormat:
    """Format of text files and the way they are divided into documents.

    Attributes:
        format: One of `FORMATS`, or "auto" to determine it from the suffix of each file.
        text_key: Field (JSONL) or column (Parquet, CSV) that contains the text.
        separator: Line of plain text that ends a document ("" is a blank line). A newline makes
            every line a document. None makes the whole file one document.
    """

    format: str = "auto"
    text_key: str = "text"
    separator: str | None = None


class Shard(NamedTuple):
    """Piece of a file: bytes (JSONL, text) or row groups (Parquet) from `start` up to `stop`.

    Attributes:
        path: The file.
        format: One of `FORMATS`, or "array" for a JSON file with one array of objects.
        start: First byte or row group.
        stop: Byte or row group after the last, or None if the whole file is read.
        size: Share of the file, in bytes.
    """

    path: str
    format: str
    start: int
    stop: int | None
    size: int


def expand_inputs(patterns: list[str], flag: str = "--input") -> list[str]:
    """Return the absolute paths of the files that paths, folders and globs name.

    The order is that of the patterns; the files of a folder or glob are sorted. A file that has
    further names through links appears once. A folder is replaced by its files with a known suffix,
    including those of its subfolders but not hidden or empty files.

    Args:
        patterns: Paths, folders and globs.
        flag: Name of the flag, for error messages.

    Raises:
        UserError: A pattern matches nothing, a folder without text, or an empty file.
    """
    paths: dict[tuple[int, int], str] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            for path in _files_of_folder(pattern, flag):
                paths.setdefault(file_identity(path), path)
            continue
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        files = [os.path.abspath(path) for path in sorted(matches) if os.path.isfile(path)]
        if not files:
            problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise UserError(f"{flag} {pattern} {problem}. Give the path of a file or a glob.")
        for path in files:
            if os.path.getsize(path) == 0:
                raise UserError(f"{flag} {path} is empty. Remove it from the flag.")
            paths.setdefault(file_identity(path), path)
    return list(paths.values())


def _files_of_folder(folder: str, flag: str) -> list[str]:
    """Return the files of a folder that contain text by their suffix, sorted by path."""
    files, other_suffixes = [], set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.abspath(os.path.join(parent, name))
            if name.startswith(".") or not os.path.getsize(path):
                continue
            if format_of_suffix(path):
                files.append(path)
            else:
                other_suffixes.add(Path(path).suffix or name)
    if not files:
        endings = (
            f" Its files end in {', '.join(sorted(other_suffixes)[:8])}." if other_suffixes else ""
        )
        raise UserError(
            f"{flag} {folder} is a folder without a file of text ({', '.join(_SUFFIXES)})."
            f"{endings} Give another folder, or a glob and --format."
        )
    return sorted(files)


def file_identity(path: str) -> tuple[int, int]:
    """Return the device and inode of a file, which are the same for all of its names."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def plan_shards(paths: list[str], layout: TextFormat, shard_bytes: int) -> list[Shard]:
    """Divide files into shards of about `shard_bytes`, the same ones in every run.

    Args:
        paths: The files.
        layout: Format of the files.
        shard_bytes: Approximate size of a shard.

    Raises:
        UserError: A format is unknown, a file is broken or lacks the text column, or a file is too
            large to be one document.
    """
    shards: list[Shard] = []
    for path in paths:
        kind, size = _format_of(path, layout), os.path.getsize(path)
        if kind == "parquet":
            shards += _parquet_shards(path, layout.text_key, size, shard_bytes)
            continue
        if kind == "jsonl" and ".json" in Path(path.lower()).suffixes and _is_document(path):
            kind = "array"
        if kind in ("jsonl", "csv", "array"):
            _check_text_key(path, kind, layout.text_key)
        # A newline within the quotes of a CSV file does not end a row.
        if is_compressed(path) or kind in ("csv", "array"):
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
    """Return the error for a file with a document above `MAX_PLAIN_DOCUMENT`."""
    limit = MAX_PLAIN_DOCUMENT >> 20
    return UserError(
        f"{path} has a document over {limit} MiB. Set --document-separator to a line that divides "
        "it."
    )


def format_of_suffix(path: str) -> str:
    """Return the format of a file, after decompression, or an empty string if it is unknown."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    return _SUFFIXES.get(suffixes[-1 - compressed], "") if len(suffixes) > compressed else ""


def _format_of(path: str, layout: TextFormat) -> str:
    kind = format_of_suffix(path) if layout.format == "auto" else layout.format
    if not kind:
        endings = f"{', '.join(_SUFFIXES)}, compressed {', '.join(COMPRESSIONS)}"
        raise UserError(
            f"{path} has no known suffix ({endings}). Set --format to jsonl, csv or text."
        )
    if kind == "parquet" and is_compressed(path):
        raise UserError(
            f"{path} is a compressed Parquet file. Decompress it: Parquet compresses its own pages."
        )
    return kind


def _is_document(path: str) -> bool:
    """Return whether a JSON file is an array of objects, or has one, and not JSON lines."""
    from megatron_ext.data.row_files import begins_document  # which imports this module

    with open(path, "rb") as raw:
        try:
            lines = (line for line in decompressed(raw) if not line.isspace())
            return begins_document(next(lines, b""))
        except BROKEN:
            return False  # reported where it is read


def _check_text_key(path: str, kind: str, text_key: str) -> None:
    """Check that a CSV file, or the first objects of a JSON file, have the text column.

    Other objects without it are malformed; a file whose first ones all lack it has another schema.
    """
    with open(path, "rb") as raw:
        try:
            stream = decompressed(raw)
            if kind == "csv":
                if text_key not in (columns := csv_columns(stream, path)):
                    raise missing_column(path, text_key, columns, "--text-key")
                return
            keys: dict[str, None] = {}
            records = _array_rows(path) if kind == "array" else map(_json_row, stream)
            for record in itertools.islice(records, _FIRST_OBJECTS):
                # Malformed lines are counted and reported where they are read.
                if not isinstance(record, dict) or text_key in record:
                    return
                keys |= dict.fromkeys(record)
        except BROKEN as error:
            raise UserError(f"{path} is truncated or broken: {error}. Copy it again.") from error
    if keys:
        raise missing_column(path, text_key, keys, "--text-key")


def _array_rows(path: str) -> Iterator[Any]:
    from megatron_ext.data.row_files import read_rows

    return (row for _, row in read_rows(path))


def _json_row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def open_parquet(path: str) -> Any:
    """Open a Parquet file to be read as a stream.

    By default pyarrow keeps everything that it has read of a column until the last row.

    Raises:
        UserError: The file is not readable.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a readable Parquet file or is truncated: {error}. Copy it again."
        ) from error


def _parquet_shards(path: str, text_key: str, size: int, shard_bytes: int) -> Iterator[Shard]:
    import pyarrow

    with open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    kinds = [field.type for field in schema if field.name == text_key]
    if not kinds:
        raise missing_column(path, text_key, schema.names, "--text-key")
    if len(kinds) > 1:
        raise UserError(f"{path} has {len(kinds)} columns {text_key!r}. Rename all but one.")
    [kind] = kinds
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(values) for test in is_text):
        raise UserError(
            f"Column {text_key!r} of {path} contains {kind}, not text. Set --text-key to a column "
            "of text."
        )
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    share = size / max(1, sum(rows))
    start = 0
    for group in range(len(rows)):
        shard_size = round(share * sum(rows[start : group + 1]))
        if shard_size >= shard_bytes or group + 1 == len(rows):
            yield Shard(path, "parquet", start, group + 1, shard_size)
            start = group + 1
