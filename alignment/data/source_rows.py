"""Streaming input of JSONL and Parquet rows, and atomic output of records.

Memory is bounded by the largest row (Parquet: by one row group), whatever the number of rows. An
output file appears under its name only when it is complete.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from alignment.records import Pair, Prompt, Response, Verdict
from megatron_ext.data.decompression import BROKEN, COMPRESSIONS, decompressed, is_compressed
from megatron_ext.data.shards import format_of_suffix, open_parquet
from megatron_ext.errors import UserError

Record = Prompt | Response | Pair | Verdict
_BATCH = 256  # rows that are read or written at a time
_GROUP = 2048  # rows of a Parquet row group, which a reader must load at once


class MalformedRow(UserError):
    """Row that cannot be used. The message does not name the file.

    Attributes:
        reason: Why it cannot be used, without the row's number.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number:,}: {reason}")
        self.reason = reason


def columns_of(path: str | Path) -> list[str]:
    """Return the columns of a Parquet file, or the fields of the first valid row of a JSONL file.

    Raises:
        UserError: The file has no such row, or cannot be read.
    """
    if _format(path) == "parquet":
        with open_parquet(str(path)) as file:
            return list(file.schema_arrow.names)
    malformed: MalformedRow | None = None
    for _, row in read_rows(path):
        if not isinstance(row, MalformedRow):
            return list(row)
        malformed = malformed or row
    raise UserError(f"{path}, {malformed}" if malformed else f"{path} has no rows")


def read_rows(
    path: str | Path, report_progress: Callable[[int], None] = lambda consumed: None
) -> Iterator[tuple[int, dict[str, Any] | MalformedRow]]:
    """Yield the rows of a JSONL file (plain or compressed) or a Parquet file.

    Args:
        path: File to read.
        report_progress: Function that is called now and then with the number of bytes read so far.

    Yields:
        The number of the line (JSONL) or row (Parquet) from 1, and the row.

    Raises:
        UserError: The file does not exist, has another format, or is damaged.
    """
    read = _read_parquet if _format(path) == "parquet" else _read_jsonl
    try:
        yield from read(path, report_progress)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _format(path: str | Path) -> str:
    kind = format_of_suffix(str(path))
    if kind not in ("jsonl", "parquet") or (kind == "parquet" and is_compressed(str(path))):
        raise UserError(
            f"{path} is read by its suffix: .jsonl (also {', '.join(COMPRESSIONS)}) or .parquet"
        )
    return kind


def _read_jsonl(path: str | Path, report_progress: Callable[[int], None]) -> Iterator[Any]:
    with open(path, "rb") as raw:
        try:
            for number, line in enumerate(decompressed(raw), start=1):
                if not line.isspace():
                    yield number, _json_row(number, line)
                if number % _BATCH == 0:
                    report_progress(raw.tell())
        except BROKEN as error:
            raise UserError(f"{path} is truncated or broken: {error}") from error


def _json_row(number: int, line: bytes) -> dict[str, Any] | MalformedRow:
    try:
        row = json.loads(line.decode(), parse_constant=_no_number)
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return MalformedRow(number, "a lone surrogate, not text")
    except (ValueError, RecursionError) as error:
        return MalformedRow(number, f"invalid JSON: {error}")
    if not isinstance(row, dict):
        return MalformedRow(number, "not a JSON object")
    return row


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


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
            raise UserError(f"{path} is truncated or broken: {error}") from error


class RecordWriter:
    """Context manager that writes records of one kind to a file.

    The file receives its name when the block ends without an error.

    Args:
        path: File to write, with the suffix .jsonl or .parquet.
        overwrite: Whether to replace an existing file.

    Raises:
        UserError: The file exists already, or has another suffix.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        if path.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{path} is written by its suffix: .jsonl or .parquet")
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists. Add --overwrite, or choose another file.")
        self.path, self.count = path, 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: Any = None
        self._parquet: Any = None
        self._kind: type[Record] | None = None
        self._batch: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")
        return self

    def write(self, record: Record) -> None:
        """Add a record.

        Raises:
            UserError: The record is of another kind than those before it.
        """
        kind = type(record)
        self._kind = self._kind or kind
        if kind is not self._kind:
            raise UserError(
                f"{self.path} cannot hold a {kind.__name__} and a {self._kind.__name__}. "
                "Import them into separate files, or choose one kind with --as."
            )
        self.count += 1
        self._batch.append(record.to_row())
        if len(self._batch) == (_GROUP if self.path.suffix == ".parquet" else _BATCH):
            self._flush()

    def _flush(self) -> None:
        if self.path.suffix == ".jsonl":
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._batch]
            self._file.write("".join(lines).encode())
        elif self._kind is not None:
            import pyarrow
            import pyarrow.parquet

            schema = parquet_schema(self._kind)
            if self._parquet is None:
                self._parquet = pyarrow.parquet.ParquetWriter(self._file, schema)
            self._parquet.write_table(pyarrow.Table.from_pylist(self._batch, schema))
        self._batch = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            if kind is None:
                self._flush()
                if self._parquet is not None:
                    self._parquet.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.replace(self.path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def parquet_schema(kind: type[Record]) -> Any:
    """Return the Parquet schema of a kind of record."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct({"role": text, "content": text})
    prompt: Mapping[str, Any] = {
        "id": text, "messages": pa.list_(message), "source": text, "rubric": text,
    }  # fmt: skip
    columns: dict[type[Record], Mapping[str, Any]] = {
        Prompt: prompt,
        Response: {"id": text, "prompt": pa.struct(prompt), "text": text, "source": text},
        Pair: {
            "id": text, "prompt": pa.struct(prompt), "first": text, "second": text,
            "preferred": text, "source": text,
        },
        Verdict: {
            "item": text, "outcome": text, "score": pa.float64(), "preferred": text,
            "swapped": pa.bool_(), "sample": pa.int64(), "reason": text, "thinking": text,
            "answer": text, "judge": text,
        },
    }  # fmt: skip
    return pa.schema(columns[kind])
