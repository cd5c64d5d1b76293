"""Tests of asynchronous saves: as exact as synchronous ones, and no process outlives its rank."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.distributed import ROOT, SINGLE_THREADED, run_ranks, torchrun
from tests.megatron import TINY
from tests.training.test_faults import start_and_do, whole_checkpoints
from tests.training.test_pretrain import EP2, pretrain, rows_of
from tests.warm import warm_python


def of_run(mark: str) -> list[psutil.Process]:
    """Return every process with that mark in its environment."""
    results = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_RUN") == mark:
                results.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return results


@pytest.mark.slow
def test_async_save_resumes_bit_for_bit_from_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    python = warm_python()  # its server lives on, so it must not have the mark
    monkeypatch.setenv("TEST_RUN", mark)
    flags = [*EP2, "--async-save", "--save-interval", "1"]
    # By torchrun: the environment of a forked rank, as the system shows it, is its server's.
    done = torchrun(
        ["pretrain_et.py", *TINY, "--run-dir", tmp_path / "run", *flags], 2, python=python
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _wait(lambda: of_run(mark) == [], 30)
    undisturbed = rows_of(tmp_path / "run")
    load = ("--load", str(tmp_path / "run" / "checkpoints"))
    for step in (1, 4):  # in the warm-up and after it, while training went on
        resumed = pretrain(tmp_path / str(step), *EP2, *load, "--ckpt-step", str(step))
        assert resumed == undisturbed[step:]


def later_changes() -> tuple[list[float], list[float]]:
    """Return what a checkpoint contains if training changes a tensor while it is written."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_ext.devices import async_save

    results = []
    for writing in (False, True):
        async_save._writing = writing
        tensor = torch.ones(2)
        [(_, _, (_, [(_, copy)]))] = FileSystemWriterAsync.preload_tensors(
            [("file", "key", ([], [("item", tensor)]))], True
        )
        tensor += 1
        results.append(copy.tolist())
    return results[0], results[1]


def test_async_save_writes_tensors_as_they_were_at_the_save() -> None:
    [(by_the_rank, by_another)] = run_ranks(later_changes, 1)
    assert by_another == [1.0, 1.0]
    assert by_the_rank == [2.0, 2.0]  # no copy where the rank waits


@pytest.mark.slow
def test_async_save_of_killed_ranks_leaves_no_process(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    command = [warm_python(), "pretrain_et.py", *TINY, "--run-dir", str(tmp_path), "--async-save"]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    network = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    run = subprocess.Popen(
        [*command, "--train-iters", "1000000", "--save-interval", "2"],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED, **network, "TEST_RUN": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        saved = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
        _wait(lambda: saved.is_file() or run.poll() is not None, 200)
        assert run.poll() is None
        assert len(of_run(mark)) > 1  # those that write, or hold what was written
        run.send_signal(signal.SIGKILL)
        run.wait()
        _wait(lambda: not of_run(mark), 60)
    finally:
        for process in of_run(mark):
            process.kill()
        run.wait()


@pytest.mark.slow
def test_async_save_completes_after_signals_to_all_processes(tmp_path: Path) -> None:
    flags = [*TINY, "--run-dir", str(tmp_path), "--async-save", "--save-interval", "2"]
    [(code, stderr)] = run_ranks(start_and_do, 1, flags, 4, {0: signals_to_all})
    assert code == 0, stderr
    assert whole_checkpoints(tmp_path) == ["iter_0000002", "iter_0000004"]


def signals_to_all() -> None:
    """Send signals, as Slurm and torchrun do, to every process of a rank."""
    os.killpg(0, signal.SIGUSR1)
    os.killpg(0, signal.SIGTERM)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
