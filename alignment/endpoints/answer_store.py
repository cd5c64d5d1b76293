"""Answers that were paid for, kept on disk as they come.

A store is a file of JSON lines, only ever appended to, each line a key and an answer. A line is
synced to the disk before its answer counts, so a process that is killed at any moment leaves every
answer it had counted. In memory are keys and places, not the answers.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError


class AnswerStore:
    """The answers in a file, which is made where there is none; one process at a time has it.

    A last line that was cut off by a kill or a crash is taken away on opening.

    Attributes:
        mended: how many bytes of a torn last line were taken away.

    Raises:
        UserError: another process has the file, or it is no store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{path} cannot be opened to keep answers: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(
                f"another run has {path} open: wait for its end, or give another --cache"
            ) from None
        try:
            self._places, self.mended = self._read()
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> dict[str, Any]:
        start, size = self._places[key]
        return json.loads(os.pread(self._file, size, start))["answer"]

    def add(self, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep answers; they are on the disk when this returns.

        Raises:
            OSError: there is no room, say; then none of them counts.
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

    def _read(self) -> tuple[dict[str, tuple[int, int]], int]:
        places: dict[str, tuple[int, int]] = {}
        start, size = 0, os.fstat(self._file).st_size
        with open(os.dup(self._file), "rb") as stream:
            stream.seek(0)
            for number, line in enumerate(stream, start=1):
                key = _key(line)
                if key is None:
                    if start + len(line) < size:
                        raise UserError(
                            f"{self.path}, line {number}, is no answer of a judge: the file is "
                            "damaged, or not one that keeps answers"
                        )
                    break
                places[key] = (start, len(line))
                start += len(line)
        # A file of another kind is not to be emptied: a torn line is the beginning of one of ours.
        if start < size and not _begins_like_ours(os.pread(self._file, 8, start)):
            raise UserError(f"{self.path} is not a file that keeps answers: give another --cache")
        if start < size:
            os.ftruncate(self._file, start)
            os.fsync(self._file)
        return places, size - start


def _key(line: bytes) -> str | None:
    """Of a whole line; None where it is torn or something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return row["key"] if isinstance(row["answer"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def _begins_like_ours(start: bytes) -> bool:
    # After a loss of power a file may end in zeros where its last line was to be.
    return b'{"key": '.startswith(start) or not start.strip(b"\0")


def _write(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    """So that a file just made is still there after a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
