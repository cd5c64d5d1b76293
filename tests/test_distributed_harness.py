"""Tests of the harness of other tests: results, failures, hangs, and leftovers."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_ext.devices import is_cpu_device
from tests.distributed import HAS_GPU, run_ranks, torchrun


def _describe(suffix):
    return f"{dist.get_rank()}/{dist.get_world_size()}{suffix}", os.getpid()


def _reduced(width):
    values = torch.full([width], float(dist.get_rank() + 1))  # [width]
    dist.all_reduce(values)
    return values


def _settings(name):
    launcher = [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return launcher, os.environ.get(name), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


class _Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def _fail_on(rank, error):
    if dist.get_rank() == rank:
        if error is _Unpicklable:
            raise _Unpicklable("this", "that")
        raise error(f"rank {rank} refuses")
    dist.barrier()


def _exit_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def _hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(3600)


def _hang_with_child(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    (folder / str(dist.get_rank())).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(3600)


def _return_lambda():
    return lambda: None


def _megatron():
    imported = "megatron.training" in sys.modules
    return imported, is_cpu_device(), os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def test_run_ranks_returns_results_in_rank_order():
    results = run_ranks(_describe, 3, "!")
    assert [text for text, _ in results] == ["0/3!", "1/3!", "2/3!"]
    assert not any(_alive(pid) for _, pid in results)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_sums_over_ranks(world_size):
    total = world_size * (world_size + 1) / 2
    for result in run_ranks(_reduced, world_size, 5):
        torch.testing.assert_close(result, torch.full([5], total))


def test_ranks_see_the_launcher_variables_the_environment_of_the_test_and_one_thread(monkeypatch):
    monkeypatch.setenv("HARNESS_TEST", "set by the test")
    first, second = run_ranks(_settings, 2, "HARNESS_TEST")
    assert first == (["0", "0", "2"], "set by the test", 1, "1")
    assert second[0] == ["1", "1", "2"]
    assert run_ranks(_settings, 1, "OTHER", env={"OTHER": "given"})[0][1] == "given"


@pytest.mark.skipif(HAS_GPU, reason="nothing of CUDA is preloaded")
def test_ranks_start_with_megatron_imported_and_the_cpu_device_active():
    imported, cpu_device, connections = run_ranks(_megatron, 1)[0]
    assert imported and cpu_device and connections == "1"


@pytest.mark.parametrize("error", [ValueError, KeyError, SystemExit])
def test_run_ranks_raises_an_exception_with_rank_and_traceback(error):
    started = time.monotonic()
    with pytest.raises(error, match="rank 1 refuses") as caught:
        run_ranks(_fail_on, 3, 1, error)
    (note,) = caught.value.__notes__
    assert "on rank 1 of 3" in note and "_fail_on" in note
    assert time.monotonic() - started < 30


def test_run_ranks_keeps_name_and_text_of_an_exception_that_does_not_pickle():
    with pytest.raises(RuntimeError, match="_Unpicklable: this and that"):
        run_ranks(_fail_on, 2, 0, _Unpicklable)


def test_run_ranks_refuses_a_result_that_does_not_pickle():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        run_ranks(_return_lambda, 1)


def test_run_ranks_names_a_rank_that_dies_with_its_exit_code():
    with pytest.raises(RuntimeError, match=r"rank 1 \(exit code 7\) of 2"):
        run_ranks(_exit_on, 2, 1)


def test_run_ranks_timeout_names_the_hanging_rank_and_place():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 still ran after 6 s") as caught:
        run_ranks(_hang_on, 2, 1, timeout=6)
    assert "_hang_on" in str(caught.value)


def test_run_ranks_timeout_kills_children_of_ranks(tmp_path):
    with pytest.raises(TimeoutError):
        run_ranks(_hang_with_child, 2, tmp_path, timeout=6)
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    _wait_until_gone(pids)


_SCRIPT = r"""
import os, sys, time
rank, world, greeting, seconds, status = *map(os.environ.get, ("RANK", "WORLD_SIZE")), *sys.argv[1:]
sys.stdout.write(f"rank {rank} of {world}: {greeting} {os.getpid()}\n")  # in one piece
sys.stdout.flush()
time.sleep(float(seconds))
if status == "0":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
sys.exit(int(status))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(_SCRIPT)
    return path


@pytest.mark.slow
def test_torchrun_returns_output_and_exit_status(script):
    done = torchrun([script, "hello", "0", "0"], 2)
    assert done.returncode == 0, done.stderr
    assert {line.rsplit(" ", 1)[0] for line in done.stdout.splitlines()} == {
        "rank 0 of 2: hello",
        "rank 1 of 2: hello",
    }
    failed = torchrun([script, "hello", "0", "3"], 1)
    assert failed.returncode != 0
    assert "exitcode  : 3" in failed.stderr


@pytest.mark.slow
def test_torchrun_kills_its_workers_on_timeout(script):
    for timeout in (15, 40, 90):  # a busy machine may not have started them yet
        with pytest.raises(TimeoutError) as caught:
            torchrun([script, "hello", "3600", "0"], 2, timeout=timeout)
        lines = [line for line in str(caught.value).splitlines() if line.startswith("rank ")]
        if len(lines) == 2:
            break
    words, pids = zip(*(line.rsplit(" ", 1) for line in lines))
    assert set(words) == {"rank 0 of 2: hello", "rank 1 of 2: hello"}
    _wait_until_gone([int(pid) for pid in pids])
