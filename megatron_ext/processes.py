"""Helper processes that end with the process they help."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """End this process, a child of `multiprocessing`, when its parent has ended in any way.

    A parent that is killed cannot tell its children, and some of Megatron's would wait for ever.
    And only so: torchrun and Slurm send their signals to every process of a rank, which then still
    needs its helpers to save.
    """
    for warning in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(warning, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent,), daemon=True).start()


def _wait_and_exit(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
