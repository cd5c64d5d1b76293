"""Processes of a run: helpers and ranks that end with their parent, and one run in a folder."""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

from megatron_ext.errors import UserError

# Seconds for which a new run waits for the processes of a killed one to end.
_LOCK_PATIENCE = 5.0
_PARENT_POLL = 1.0  # seconds


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


def stop_with_launcher(stop: signal.Signals, grace: float) -> None:
    """Stop this rank when the torchrun that started it has ended without stopping it.

    A launcher that is killed cannot stop its ranks, and a second start of the same run would meet
    them. Ranks that something else started, such as Slurm or a shell, are left alone.

    Args:
        stop: signal on which training saves and ends.
        grace: seconds after which a rank that is still there ends at once.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        arguments = (parent, stop, grace)
        threading.Thread(target=_stop_after, args=arguments, daemon=True).start()


def _stop_after(parent: int, stop: signal.Signals, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL)
    rank = os.environ.get("RANK", "0")
    try:
        name = Path(sys.argv[0]).name
        print(f"{name}: rank {rank} stops: its launcher has ended", file=sys.stderr, flush=True)
    except OSError:  # the launcher may have read this output
        pass
    os.kill(os.getpid(), stop)
    time.sleep(grace)
    os._exit(1)


def lock_folder(folder: Path) -> IO[str]:
    """Claim a run directory, which is made where it is missing, for this process.

    Returns:
        the open lock file. The claim ends when it is closed or the process ends in any way. On a
        file system without locks there is a warning and no claim.

    Raises:
        UserError: another process has the claim, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644), "w")
    except OSError as error:
        raise UserError(f"--run-dir {folder} cannot be written: {error.strerror}") from error
    # A forked helper would otherwise keep the claim of a rank that was killed.
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
                    f"another process trains in --run-dir {folder}: wait for its end or stop it, "
                    "or give another --run-dir"
                ) from None
            time.sleep(0.2)
        except OSError as error:  # some shared file systems are mounted without locks
            name = Path(sys.argv[0]).name
            message = (
                f"{name}: warning: {folder} cannot be locked ({error.strerror}): start one run"
            )
            print(f"{message} in it at a time", file=sys.stderr, flush=True)
            return file
