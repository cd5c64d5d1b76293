"""Tests of runs with faults: nothing is lost, and the cause is reported."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint

from megatron_ext.checkpoint import damage
from tests.distributed import ROOT, run_ranks, torchrun
from tests.megatron import TINY
from tests.pretraining import start, train
from tests.warm import warm_python

STEPS = 14
SAME = [*TINY, "--train-iters", str(STEPS), "--save-interval", "2"]
SPEED = ("seconds", "tokens_per_s", "flops_per_s_per_device", "mfu")


def start_and_do(flags: list[str], step: int, deeds: dict[int, partial[Any]]) -> Any:
    """Run like `start`; before step `step` of this start, each rank of `deeds` does its deed."""
    from megatron.training import training

    train_step, steps = training.train_step, 0
    deed = deeds.get(int(os.environ["RANK"]))

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            if deed is not None:
                deed()
            dist.barrier()  # no rank begins the step before the fault
        return train_step(*args, **kwargs)

    training.train_step = disturbed
    return start(flags)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the training rows of a run without the values that depend on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in SPEED} for row in results if "loss" in row]


def whole_checkpoints(run_dir: Path) -> list[str]:
    """Return the iterations in a run directory, all of which must be complete."""
    folders = sorted((run_dir / "checkpoints").glob("iter_*"))
    assert [damage(folder) for folder in folders] == [None] * len(folders)
    return [folder.name for folder in folders]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the rows of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train([*SAME, "--run-dir", str(folder)])
    result = rows(folder)
    assert [row["step"] for row in result] == list(range(1, STEPS + 1))
    return result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_a_run_after_every_kind_of_death(
    undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    faults = {
        "killed_in_forward:1:4": "exitcode: -9",
        "killed_in_cutoff_collective:1:5": "exitcode: -9",
        "killed_while_saving:0:6": "exitcode: -9",
        "killed_before_tracker:0:6": "exitcode: -9",
        "nan_in_gradient:1:8": "Unexpected result nan on rank 1",
        "hung_in_forward:1:9": "in step 9: rank 1 on ",
    }
    result = torchrun(
        [
            *("--max-restarts", str(len(faults)), "--shutdown-timeout", "1"),
            *("tests/training/faulty_pretrain.py", *SAME, "--run-dir", str(tmp_path)),
            *("--stall-timeout", "10"),
        ],
        nproc=2,
        env={"FAULTS": ",".join(faults), "PYTHONPATH": str(ROOT)},
        timeout=850,
        python=warm_python(),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr.count("failed (exitcode") == len(faults)
    for message in faults.values():
        assert message in result.stderr
    assert rows(tmp_path) == undisturbed
    assert whole_checkpoints(tmp_path) == [f"iter_{i:07d}" for i in range(2, STEPS + 1, 2)]


def test_ranks_started_unlike_or_not_at_all_are_named_before_training(tmp_path: Path) -> None:
    flags = [*SAME, "--run-dir", str(tmp_path / "run")]
    ended = run_ranks(start, 2, flags, {1: ["--lr", "0.5"]})
    assert [code for code, _ in ended] == [2, 2]
    message = "".join(stderr for _, stderr in ended)
    assert "Rank 1 on " in message
    assert "with lr = 0.5 and rank 0 with 0.01. Start all ranks with the same" in message
    assert message.count("pretrain_et.py:") == 1

    ended = run_ranks(start, 2, [*flags, "--stall-timeout", "4"], {}, {1: 12})
    assert [code for code, _ in ended] == [2, 2]
    assert "these were not ready within 4 s" in "".join(stderr for _, stderr in ended)
    assert not (tmp_path / "run/metrics.jsonl").exists()

    in_time = ["--stall-timeout", "60", "--train-iters", "2"]
    ended = run_ranks(start, 2, [*flags, *in_time], {}, {1: 2})
    assert [code for code, _ in ended] == [0, 0]


@pytest.mark.slow
def test_a_signal_to_some_or_all_ranks_saves_and_ends_the_run(
    undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    flags = [*SAME, "--run-dir", str(tmp_path)]
    terminate = partial(signal.raise_signal, signal.SIGTERM)
    ended = run_ranks(start_and_do, 2, flags, 3, {0: terminate, 1: terminate})
    assert [code for code, _ in ended] == [0, 0]
    assert whole_checkpoints(tmp_path)[-1] == "iter_0000003"
    for rank, step in ((1, 4), (0, 2)):
        warned = {rank: partial(signal.raise_signal, signal.SIGUSR1)}
        ended = run_ranks(start_and_do, 2, flags, step, warned)
        assert [code for code, _ in ended] == [0, 0]
    assert whole_checkpoints(tmp_path)[-1] == "iter_0000009"
    assert rows(tmp_path) == undisturbed[:9]
    train(flags)
    assert rows(tmp_path) == undisturbed


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(
    undisturbed: list[dict[str, Any]], small_disk: Path
) -> None:
    run = small_disk / "run"
    ended = run_ranks(start, 2, [*SAME, "--run-dir", str(run)], {}, {})
    assert {code for code, _ in ended} == {2}
    message = "".join(stderr for _, stderr in ended)
    assert f"{run}/checkpoints/iter_0000004 could not be saved" in message
    assert "MB free" in message
    assert "Traceback" not in message
    assert whole_checkpoints(run) == ["iter_0000002"]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    train([*SAME, "--run-dir", str(run)])
    assert rows(run) == undisturbed


@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "missing"])
def test_damaged_checkpoint_is_refused_or_replaced_by_an_older_one(
    harm: str, trained: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "checkpoints/iter_0000004/__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if harm != "missing":
        file.write_bytes(content if harm == "flipped bit" else content[:-1])
    flags = [*SAME, "--run-dir", str(run)]
    ended = run_ranks(start, 2, flags)
    assert [code for code, _ in ended] == [2, 2]
    message = "".join(stderr for _, stderr in ended)
    assert "iter_0000004 is damaged: its file __1_0.distcp " in message
    assert "--allow-older-checkpoint" in message

    flags += ["--allow-older-checkpoint", "--exit-interval", "6"]
    train(flags)
    assert rows(run) == undisturbed[:6]
    assert whole_checkpoints(run)[-1] == "iter_0000006"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was stopped after four steps."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*SAME, "--run-dir", str(folder), "--exit-interval", "4"]
    train(flags)
    return folder


def test_resume_without_a_whole_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for folder in (run / "checkpoints").glob("iter_*"):
        (folder / "integrity.json").unlink()
    flags = [*SAME, "--run-dir", str(run), "--allow-older-checkpoint"]
    ended = run_ranks(start, 2, flags)
    assert [code for code, _ in ended] == [2, 2]
    message = "".join(stderr for _, stderr in ended)  # either rank may report it
    assert "it was not saved completely" in message
    assert "no older checkpoint in that folder is intact" in message


def test_torn_tracker_file_is_repaired(
    trained: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("")
    flags = [*SAME, "--run-dir", str(run), "--exit-interval", "6"]
    train(flags)
    assert rows(run) == undisturbed[:6]


@pytest.mark.slow
def test_skipped_step_leaves_the_thresholds(tmp_path: Path) -> None:
    """In fp16 a loss scale that is too high overflows the gradients."""
    scale = ["--initial-loss-scale", "1048576", "--hysteresis", "1", "--loss-scale-window", "4"]
    train([*SAME, "--run-dir", str(tmp_path), "--fp16", *scale])
    result = rows(tmp_path)
    skipped = [row["step"] for row in result if row["skipped"]]
    assert skipped[0] == 1 and 3 <= len(skipped) < STEPS / 2
    name = "moe/layer_01/experts/threshold"
    # The first two steps had no thresholds.
    for row, following in itertools.pairwise(result[2:]):
        assert (row[name] == following[name]) == row["skipped"]
    updates = torch.zeros((), dtype=torch.int64)
    checkpoint.load(
        {"decoder.layers.1.mlp.router.thresholds.updates": updates},
        storage_reader=checkpoint.FileSystemReader(tmp_path / f"checkpoints/iter_{STEPS:07d}"),
        no_dist=True,
    )
    assert int(updates) == STEPS - len(skipped)


def vanish(file: str | None) -> None:
    """Remove the file, if any; reads are repeated at once, not after 10, 20 and 40 s."""
    from megatron.core.datasets import indexed_dataset

    indexed_dataset.time = SimpleNamespace(time=time.time, sleep=lambda seconds: None)
    if file is not None:
        os.remove(file)


@pytest.mark.slow
def test_missing_data_on_resume_are_named(dataset: Path, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{dataset}.{suffix}", tmp_path)
    prefix, run = tmp_path / dataset.name, tmp_path / "run"
    flags = [flag for flag in SAME if flag != "--mock-data"]
    flags += ["--data-path", str(prefix), "--run-dir", str(run)]
    vanish_now = {0: partial(vanish, f"{prefix}.bin"), 1: partial(vanish, None)}

    # A mapped file remains while it is in use; the next start reports that it is missing.
    ended = run_ranks(start_and_do, 2, [*flags, "--exit-interval", "4"], 3, vanish_now)
    assert [code for code, _ in ended] == [0, 0], ended
    ended = run_ranks(start, 2, flags)
    assert [code for code, _ in ended] == [2, 2]
    assert f"{prefix}.bin does not exist" in "".join(stderr for _, stderr in ended)

    shutil.copy(f"{dataset}.bin", tmp_path)
    ended = run_ranks(start_and_do, 2, [*flags, "--no-mmap-bin-files"], 3, vanish_now)
    assert {code for code, _ in ended} == {2}
    message = "".join(stderr for _, stderr in ended)
    assert "The data cannot be read any more" in message and f"{prefix}.bin" in message
    assert whole_checkpoints(run) == ["iter_0000002", "iter_0000004", "iter_0000006"]
