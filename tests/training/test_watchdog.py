"""Tests of the watchdog of stalled ranks without a training run."""

import subprocess
import sys
import textwrap
import threading

import torch.distributed as dist

from megatron_ext.training.launch import Launch
from megatron_ext.training.watchdog import Watchdog


def test_watchdog_threads_end_with_the_context():
    launch = Launch(dist.HashStore(), 0, 2, 1.0)
    with Watchdog(launch, 1.0, lambda: 1):
        assert sum(thread.name == "watchdog" for thread in threading.enumerate()) == 2
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_process_exits_cleanly_while_its_watchdog_asks_the_store():
    """A daemon thread that returns from the store while Python ends would abort the process."""
    program = """
        import torch.distributed as dist
        from megatron_ext.training.launch import Launch
        from megatron_ext.training.watchdog import Watchdog

        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
        launch = Launch(store, 0, 2, 1e9)
        watchdog = Watchdog(launch, 1e9, lambda: 1)
        watchdog._pause = 0.0
        with watchdog:
            pass
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
