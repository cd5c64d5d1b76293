"""Atomic output of records: a file appears under its name only when it is complete.

Memory is bounded by the largest batch of rows, whatever their number.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignment.data.source_row import Record
from alignment.records import Pair, Prompt, Response, Verdict
from megatron_ext.errors import UserError

_BATCH = 256  # rows that are written at a time
_GROUP = 2048  # rows of a Parquet row group, which a reader must load at once


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
            raise UserError(f"{path} must end with .jsonl or .parquet, which selects the format.")
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
                f"{self.path} cannot contain both a {kind.__name__} and a {self._kind.__name__}. "
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
            rows = [_with_metadata_as_text(row) for row in self._batch]
            self._parquet.write_table(pyarrow.Table.from_pylist(rows, schema))
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


def _with_metadata_as_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose metadata, the columns of which differ from file to file, is JSON text."""
    row = dict(row)
    if "metadata" in row:
        row["metadata"] = json.dumps(row["metadata"], ensure_ascii=False)
    if isinstance(row.get("prompt"), dict):
        row["prompt"] = _with_metadata_as_text(row["prompt"])
    return row


def parquet_schema(kind: type[Record]) -> Any:
    """Return the Parquet schema of a kind of record."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct({"role": text, "content": text})
    prompt: Mapping[str, Any] = {
        "id": text, "messages": pa.list_(message), "source": text, "rubric": text,
        "metadata": text,
    }  # fmt: skip
    columns: dict[type[Record], Mapping[str, Any]] = {
        Prompt: prompt,
        Response: {"id": text, "prompt": pa.struct(prompt), "text": text, "source": text},
        Pair: {
            "id": text, "prompt": pa.struct(prompt), "first": text, "second": text,
            "preferred": text, "source": text, "tied": pa.bool_(),
        },
        Verdict: {
            "item": text, "outcome": text, "score": pa.float64(), "preferred": text,
            "swapped": pa.bool_(), "sample": pa.int64(), "reason": text, "thinking": text,
            "answer": text, "judge": text,
        },
    }  # fmt: skip
    return pa.schema(columns[kind])
