"""Processes of a run: children that end with their parent, and the lock of a folder."""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

from megatron_ext.console import console
from megatron_ext.errors import UserError

# Seconds to wait for the processes of a killed run to end.
_LOCK_PATIENCE = 5.0
_PARENT_POLL = 1.0  # seconds between checks of the parent


def end_with_parent() -> None:
    """End this child process of `multiprocessing` when its parent ends, and ignore signals.

    A killed parent cannot stop its children, and some children of Megatron would wait indefinitely.
    Signals are ignored because torchrun and Slurm send them to every process of a rank, which still
    needs its helpers to save a checkpoint.
    """
    for warning in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(warning, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent,), daemon=True).start()


def _wait_and_exit(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def stop_with_launcher(stop: signal.Signals, grace: float) -> None:
    """Stop this rank when the torchrun that started it has ended.

    A killed launcher cannot stop its ranks, which would interfere with a second start of the run.
    Ranks that were started otherwise, by Slurm or a shell, are not affected.

    Args:
        stop: Signal on which training saves a checkpoint and ends.
        grace: Seconds after which a rank that is still running exits immediately.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        arguments = (parent, stop, grace)
        threading.Thread(target=_stop_after, args=arguments, daemon=True).start()


def _stop_after(parent: int, stop: signal.Signals, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL)
    rank = os.environ.get("RANK", "0")
    name = Path(sys.argv[0]).name
    console.error(f"{name}: rank {rank} stops: its launcher has ended")
    os.kill(os.getpid(), stop)
    time.sleep(grace)
    os._exit(1)


def lock_folder(folder: Path) -> IO[str]:
    """Lock a run directory for this process, and create the directory if it does not exist.

    Returns:
        The open lock file. The lock is released when the file is closed or the process ends. On a
        file system without locks, a warning is printed and the folder is not locked.

    Raises:
        UserError: Another process has the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644), "w")
    except OSError as error:
        raise UserError(f"--run-dir {folder} cannot be written: {error.strerror}.") from error
    # Otherwise a forked helper would retain the lock of a killed rank.
    os.register_at_fork(after_in_child=file.close)
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UserError(
                    f"Another process uses --run-dir {folder}. Wait for it to end, stop it, or "
                    "choose another --run-dir."
                ) from None
            time.sleep(0.2)
        except OSError as error:  # some shared file systems are mounted without locks
            name = Path(sys.argv[0]).name
            message = (
                f"{name}: warning: {folder} cannot be locked ({error.strerror}): start one run"
            )
            console.warn(f"{message} in it at a time")
            return file
