"""Streaming reader of files of rows: JSON, JSON lines, CSV, TSV, Parquet and folders of them.

Memory is bounded by the largest row (Parquet: by one batch of a row group), except for a JSON
array, which is loaded as a whole.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.data.csv_rows import csv_rows
from megatron_ext.data.decompression import BROKEN, COMPRESSIONS, decompressed, is_compressed
from megatron_ext.data.shards import expand_inputs, open_parquet
from megatron_ext.errors import UserError

Row = dict[str, Any]
FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_BATCH = 256  # rows that are read at a time
_SPLITS = re.compile(r"(?<![a-z])(train|test|valid|validation|dev|eval)(?![a-z])")


class MalformedRow(UserError):
    """Row that cannot be used. The message does not name the file.

    Attributes:
        number: Number of the row from 1: of the line on which it begins (JSON lines, CSV) or of the
            row (JSON arrays, Parquet).
        reason: Why it cannot be used, without the row's number.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number:,}: {reason}")
        self.number, self.reason = number, reason


def expand_row_files(patterns: Sequence[str], flag: str = "--input") -> list[str]:
    """Return the absolute paths of the files that paths, globs and folders name.

    Args:
        patterns: Paths, globs and folders. Files of a folder and of its subfolders are sorted by
            their paths; hidden ones and those without a known suffix do not count.
        flag: Name of the flag, for error messages; empty for none.

    Raises:
        UserError: A pattern names no file, or a folder has files of several formats or splits.
    """
    paths: list[str] = []
    try:
        for pattern in patterns:
            paths += _files_of_folder(pattern, flag) if os.path.isdir(pattern) else [pattern]
        return expand_inputs(paths, flag)
    except UserError as error:
        raise UserError(str(error).lstrip()) from None


def _files_of_folder(folder: str, flag: str) -> list[str]:
    by_format: dict[str, list[str]] = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        # A JSON file next to others describes them, as split.json and dataset_infos.json do.
        suffix = _suffix(str(path))
        if kind := "description" if suffix == ".json" else FORMATS.get(suffix):
            by_format.setdefault(kind, []).append(str(path))
    if len(by_format) > 1:
        by_format.pop("description", None)
    if not by_format:
        raise UserError(f"{flag} {folder} has no file that ends with {_known_suffixes()}.")
    if len(by_format) > 1:
        few = [files[0] for files in by_format.values()]
        raise UserError(
            f"{flag} {folder} has files of several formats, such as {few[0]} and {few[1]}. "
            "Give the files of one of them."
        )
    [files] = by_format.values()
    splits = {match for file in files for match in _SPLITS.findall(Path(file).name.lower())[:1]}
    if len(splits) > 1:
        raise UserError(
            f"{flag} {folder} has files of several splits ({', '.join(sorted(splits))}). Give the "
            f"files of one, such as {folder.rstrip('/')}/*{min(splits)}*."
        )
    return files


def _known_suffixes() -> str:
    return f"{', '.join(FORMATS)} (all but Parquet also with {', '.join(COMPRESSIONS)})"


def _suffix(path: str) -> str:
    name = path.lower()
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    return Path(name).suffix


def format_of(path: str | Path) -> str:
    """Return the format of a file of rows: json, csv or parquet.

    Raises:
        UserError: Its suffix is of none of them.
    """
    kind = FORMATS.get(_suffix(str(path)), "")
    if not kind or (kind == "parquet" and is_compressed(str(path))):
        raise UserError(f"{path} is read by its suffix, one of {_known_suffixes()}. Rename it.")
    return kind


def read_rows(
    path: str | Path, report_progress: Callable[[int], None] = lambda consumed: None
) -> Iterator[tuple[int, Row | MalformedRow]]:
    """Yield the rows of a file.

    A JSON file may be an array of objects, an object with one such array, or JSON lines, whatever
    its suffix. Empty cells of a CSV file are None.

    Args:
        path: File to read.
        report_progress: Function that is called now and then with the number of bytes read so far.

    Yields:
        The number of the line (JSON lines, CSV) or row from 1, and the row.

    Raises:
        UserError: The file does not exist, has another format, or is damaged.
    """
    try:
        os.stat(path)  # a missing file is reported before its suffix
        reader = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[format_of(path)]
        yield from reader(path, report_progress)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}. Correct the path or its "
            "permissions."
        ) from error


def _read_json(path: str | Path, report_progress: Callable[[int], None]) -> Iterator[Any]:
    with open(path, "rb") as raw:
        try:
            stream = decompressed(raw)
            first = b""
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    if not first and begins_document(line):
                        yield from _document(path, line + stream.read(), number)
                        return
                    first = line
                    yield number, _json_row(number, line)
                if number % _BATCH == 0:
                    report_progress(raw.tell())
        except BROKEN as error:
            raise _broken(path, error) from error


def begins_document(line: bytes) -> bool:
    """Return whether the first line of a file begins a JSON text of several lines or an array."""
    text = line.strip()
    if text.startswith(b"["):
        return True
    try:
        row = json.loads(text) if text.startswith(b"{") else None
    except (ValueError, RecursionError):
        return text == b"{" or text.endswith((b",", b"[", b"{"))
    if not isinstance(row, dict) or not row or _looks_like_row(row):
        return False
    return all(map(_is_rows, row.values()))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _document(path: str | Path, content: bytes, line: int) -> Iterator[Any]:
    """Yield the rows of a JSON text that is an array of rows, or an object that has one."""
    try:
        value = json.loads(content.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        # The first line may just be a broken row of JSON lines.
        lines = [text for text in content.splitlines() if not text.isspace()]
        if len(lines) > 1 and all(text.lstrip().startswith(b"{") for text in lines[:2]):
            for number, text in enumerate(content.splitlines(), start=line):
                if text and not text.isspace():
                    yield number, _json_row(number, text)
            return
        raise UserError(f"{path} is not valid JSON: {error}. Correct the file.") from error
    if isinstance(value, dict):
        arrays = [name for name, each in value.items() if _is_rows(each)]
        if len(arrays) == 1 and not _looks_like_row(value):
            value = value[arrays[0]]
        elif len(arrays) > 1 and not _looks_like_row(value):
            raise UserError(
                f"{path} is an object with several arrays of rows ({', '.join(arrays)}). Write "
                "each into a separate file."
            )
        else:
            value = [value]
    if not isinstance(value, list):
        raise UserError(f"{path} is JSON, but not an array of objects. Correct the file.")
    surrogates = b"\\ud" in content.lower()
    for number, row in enumerate(value, start=1):
        yield number, _checked(number, row, surrogates)


def _looks_like_row(value: Row) -> bool:
    """Return whether an object is one row: its arrays of objects are messages or completions."""
    for each in value.values():
        if _is_rows(each) and {"role", "from", "completion", "response"} & set(each[0]):
            return True
    return False


def _json_row(number: int, line: bytes) -> Row | MalformedRow:
    try:
        row = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return MalformedRow(number, f"invalid JSON: {error}")
    return _checked(number, row, b"\\ud" in line.lower())


def _checked(number: int, row: Any, surrogates: bool) -> Row | MalformedRow:
    """Return a row of JSON, which must be an object without lone surrogates."""
    if not isinstance(row, dict):
        return MalformedRow(number, "not a JSON object")
    try:
        if surrogates:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return MalformedRow(number, "a lone surrogate, not text")
    return row


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_csv(path: str | Path, report_progress: Callable[[int], None]) -> Iterator[Any]:
    with open(path, "rb") as raw:
        try:
            for count, (number, row) in enumerate(csv_rows(decompressed(raw), str(path))):
                if isinstance(row, str):
                    yield number, MalformedRow(number, row)
                else:
                    # A column without a name is the index that pandas writes.
                    named_cells = ((name, cell) for name, cell in row.items() if name)
                    yield number, {n: cell.replace("\r\n", "\n") or None for n, cell in named_cells}
                if count % _BATCH == 0:
                    report_progress(raw.tell())
        except BROKEN as error:
            raise _broken(path, error) from error


def _read_parquet(path: str | Path, report_progress: Callable[[int], None]) -> Iterator[Any]:
    import pyarrow

    size = os.path.getsize(path)
    with open_parquet(str(path)) as file:
        total, done = max(1, file.metadata.num_rows), 0
        try:
            for batch in file.iter_batches(_BATCH):
                yield from enumerate(batch.to_pylist(), start=done + 1)
                done += batch.num_rows
                report_progress(size * done // total)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise _broken(path, error) from error


def _broken(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is truncated or broken: {error}. Copy it again.")
