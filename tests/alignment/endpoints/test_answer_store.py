"""Tests of stored answers: torn lines, other files, two writers, a full disk."""

from pathlib import Path

import pytest

from alignment.endpoints.answer_store import AnswerStore
from megatron_ext.errors import UserError


def test_answer_store_cut_anywhere_keeps_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "answers.jsonl"
    with AnswerStore(file) as store:
        store.add([("a", {"text": "ä\n"}), ("b", {"text": ""})])
        store.add([("c", {"text": "last"})])
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for size in sorted({*range(0, len(whole), 7), *(e + d for e in ends for d in (-1, 0))}):
        file.write_bytes(whole[:size])
        with AnswerStore(file) as store:
            complete = sum(end <= size for end in ends)
            assert len(store) == complete and ("c" in store) == (complete == 3)
            assert store.torn_bytes == size - ([0, *ends][complete])
            if complete:
                assert store["a"] == {"text": "ä\n"}
            store.add([("d", {"text": "more"})])
            assert store["d"] == {"text": "more"}
        with AnswerStore(file) as store:
            assert len(store) == complete + 1 and not store.torn_bytes
    file.write_bytes(whole + bytes(512))  # zeros, as a loss of power may leave
    with AnswerStore(file) as store:
        assert len(store) == 3 and store.torn_bytes == 512


@pytest.mark.parametrize(
    "content", [b"hello", b'{"item": "a"}\n', b'{"key": "a", "answer": {}}\nx\n{"key": 1}\n']
)
def test_answer_store_refuses_other_files_unchanged(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(UserError, match="notes"):
        AnswerStore(file)
    assert file.read_bytes() == content


def test_answer_store_refuses_a_second_writer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswerStore(file):
        with pytest.raises(UserError, match="Another run has"):
            AnswerStore(file)
    with AnswerStore(file):
        pass


def test_answer_store_on_a_full_disk_is_unchanged(small_disk: Path) -> None:
    file = small_disk / "answers.jsonl"
    with AnswerStore(file) as store:
        store.add([("a", {"text": "kept"})])
        with pytest.raises(OSError):
            store.add([("b", {"text": "x" * 4_000_000})])
        store.add([("c", {"text": "kept too"})])
    with AnswerStore(file) as store:
        assert not store.torn_bytes and "b" not in store and store["c"] == {"text": "kept too"}
