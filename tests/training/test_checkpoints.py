"""Tests of the list of digests that completes a checkpoint."""

import json
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint import INTEGRITY_FILE, damage, digests_file, write_and_digest
from tests.distributed import run_ranks


def write_files(folder: str, rank: int) -> None:
    for number in range(2):
        Path(folder, f"__{rank}_{number}.distcp").write_text(f"tensors {rank} {number}")


def save_asynchronously(folder: Path) -> list[str]:
    """Return, on a rank, the files that `_write_digests` reads after an asynchronous save."""
    from megatron_ext.training import saving as checkpoints

    rank = dist.get_rank()
    write_and_digest(partial(write_files, str(folder), rank), str(folder), rank)
    (folder / "common.pt").write_text("written by the ranks themselves")
    if rank == 1:
        digests_file(folder, rank).write_text('{"__1_0.distcp": "torn')
    dist.barrier()
    read = []

    def digest(file: Path) -> str:
        read.append(file.name)
        return file_digest(file)

    file_digest, checkpoints.file_digest = checkpoints.file_digest, digest
    checkpoints._write_digests(folder)
    return read


def test_digests_of_an_asynchronous_save_come_from_the_process_that_wrote(tmp_path: Path) -> None:
    read = [name for names in run_ranks(save_asynchronously, 2, tmp_path) for name in names]
    assert sorted(read) == ["__1_0.distcp", "__1_1.distcp", "common.pt"]  # a torn list is not used
    names = {f"__{rank}_{number}.distcp" for rank in range(2) for number in range(2)}
    listed = json.loads((tmp_path / INTEGRITY_FILE).read_text())["files"]
    assert listed.keys() == names | {"common.pt"}
    assert damage(tmp_path) is None
    assert {file.name for file in tmp_path.iterdir()} == {*listed, INTEGRITY_FILE}
    (tmp_path / "__0_1.distcp").write_text("tensors 0 7")
    assert damage(tmp_path) == "its file __0_1.distcp differs from what was saved"
