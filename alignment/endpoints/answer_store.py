"""Durable store of paid answers.

A store is a file of JSON lines that is only appended to; each line holds a key and an answer. A
line is synced to the disk before its answer counts, so that no counted answer is lost when the
process is killed. Only keys and file positions are in memory, not the answers.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError


class AnswerStore:
    """Answers in a file, which one process at a time may open.

    The file is created if it does not exist. A last line that was cut off by a kill or a crash is
    removed when the file is opened.

    Attributes:
        path: The file.
        torn_bytes: Number of bytes of a torn last line that were removed.

    """

    def __init__(
        self, path: Path, visit: Callable[[str, Any], None] = lambda key, answer: None
    ) -> None:
        """Open the file.

        Args:
            path: The file.
            visit: Function that receives the key and the row of every answer in the file, also of
                those that later answers replace.

        Raises:
            UserError: If another process has the file open, or it is not a store.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened to store answers: {error.strerror}. Choose another "
                "--cache."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(
                f"Another run has {path} open. Wait until it ends, or choose another --cache."
            ) from None
        try:
            self._places, self.torn_bytes = self._read(visit)
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "AnswerStore":
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        """Return whether there is an answer with this key."""
        return key in self._places

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._places)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the answer with this key."""
        start, size = self._places[key]
        return json.loads(os.pread(self._file, size, start))["answer"]

    def add(self, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Store answers, which are on the disk when this returns.

        Args:
            answers: Keys and answers.

        Raises:
            OSError: If the file cannot be written, for example because the disk is full. Then none
                of the answers counts.
        """
        lines = [
            json.dumps({"key": key, "answer": answer}, ensure_ascii=True).encode() + b"\n"
            for key, answer in answers
        ]
        start = os.fstat(self._file).st_size
        try:
            _write(self._file, b"".join(lines))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, start)
            raise
        for (key, _), line in zip(answers, lines):
            self._places[key] = (start, len(line))
            start += len(line)

    def _read(self, visit: Callable[[str, Any], None]) -> tuple[dict[str, tuple[int, int]], int]:
        places: dict[str, tuple[int, int]] = {}
        start, size = 0, os.fstat(self._file).st_size
        with open(os.dup(self._file), "rb") as stream:
            stream.seek(0)
            for number, line in enumerate(stream, start=1):
                entry = _entry(line)
                if entry is None:
                    if start + len(line) < size:
                        raise UserError(
                            f"{self.path}, line {number}, is not an answer. The file is damaged or "
                            "not an answer store. Choose another --cache."
                        )
                    break
                visit(*entry)
                places[entry[0]] = (start, len(line))
                start += len(line)
        # A file of another kind must not be emptied: only the beginning of an answer is removed.
        if start < size and not _is_torn_answer(os.pread(self._file, 8, start)):
            raise UserError(f"{self.path} is not an answer store. Choose another --cache.")
        if start < size:
            os.ftruncate(self._file, start)
            os.fsync(self._file)
        return places, size - start


def read_answers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the row of every answer in a file, without opening it as a store.

    Another process may have the file open. A torn last line is skipped. Nothing is yielded if the
    file does not exist.
    """
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                if (entry := _entry(line)) is not None:
                    yield entry


def _entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """Return the key and the answer of a line, or None if the line is torn or not an answer."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return (row["key"], row["answer"]) if isinstance(row["answer"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_torn_answer(start: bytes) -> bool:
    # After a power failure a file may end in zeros in place of its last line.
    return b'{"key": '.startswith(start) or not start.strip(b"\0")


def _write(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new file in it survives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
