"""Tests that one run at a time uses a folder, and that ranks end with their launcher."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext import processes
from megatron_ext.errors import UserError
from megatron_ext.processes import lock_folder
from tests.distributed import ROOT


def test_second_claim_of_a_folder_is_refused_until_the_first_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_LOCK_PATIENCE", 0.1)
    first = lock_folder(tmp_path / "run")
    with pytest.raises(UserError, match="Another process uses --run-dir"):
        lock_folder(tmp_path / "run")
    first.close()
    lock_folder(tmp_path / "run").close()


def test_claim_of_a_killed_process_does_not_outlive_it_in_a_forked_helper(tmp_path: Path) -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)

    def rank() -> None:
        lock = lock_folder(tmp_path)
        helper = os.fork()
        if helper == 0:
            time.sleep(60)
            os._exit(0)
        writer.send(helper)
        time.sleep(60)
        lock.close()

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    helper = reader.recv()
    process.kill()
    process.join()
    try:
        os.kill(helper, 0)  # it still exists
        lock_folder(tmp_path).close()
    finally:
        os.kill(helper, signal.SIGKILL)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--run-dir .*file/run cannot be written"):
        lock_folder(tmp_path / "file" / "run")


RANK = """
import os, signal, sys, time
from megatron_ext.processes import stop_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], "w").write("saved"), os._exit(0)))
stop_with_launcher(signal.SIGTERM, 30)
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_rank_stops_when_its_launcher_is_killed(tmp_path: Path, under_torchrun: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    if under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path / "saved")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + (20 if under_torchrun else 3)
    while time.monotonic() < deadline and not (tmp_path / "saved").is_file():
        time.sleep(0.1)
    assert (tmp_path / "saved").is_file() == under_torchrun
    if not under_torchrun:
        os.kill(rank, signal.SIGKILL)
