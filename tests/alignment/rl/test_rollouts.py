"""Tests of reading the stored rollouts of an unfinished step."""

import json
from types import SimpleNamespace
from typing import Any

from alignment.rl.rollouts import read_share, share_file


def rank(number: int, size: int) -> Any:
    return SimpleNamespace(data_rank=number, data_size=size)


def test_read_share_reads_own_file_and_all_files_of_other_numbers_of_ranks(tmp_path):
    for kind in ("ahead", "share"):
        for number in range(4):
            key = f"{kind}-{number}-of-4"
            line = json.dumps({"key": key, "answer": {"tokens": [number]}}) + "\n"
            share_file(tmp_path, kind, rank(number, 4)).write_text(line + '{"key": "torn')
    every = {f"{kind}-{number}-of-4" for kind in ("ahead", "share") for number in range(4)}

    for number in range(4):
        stored = read_share(tmp_path, rank(number, 4))
        assert stored.keys() == {f"ahead-{number}-of-4", f"share-{number}-of-4"}
        assert all(row == {"tokens": [number]} for row in stored.values())
    for number in range(2):
        assert read_share(tmp_path, rank(number, 2)).keys() == every
    assert read_share(tmp_path, rank(0, 1)).keys() == every
