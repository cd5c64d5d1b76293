"""Many ranks in one test: real processes and real gloo collectives, without a launcher.

`run_ranks` runs a function on every rank and hands back what each returned; `torchrun` runs a
script the way a user does. Both leave no process behind, whatever happens.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent

# Read before a test can activate the CPU device, which stands for CUDA.
HAS_GPU = torch.cuda.is_available()

# Ranks are forked from one server that has imported these. Importing torch and Megatron costs each
# new process six seconds of processor time, a fork of a process that has them milliseconds. It is
# safe because the imports start no thread.
PRELOAD = ["torch", "torch.distributed", *([] if HAS_GPU else ["tests.preload"])]

SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run `fn(*args)` on `world_size` gloo ranks and return their results in rank order.

    `fn` is a function at the top level of a module; it, its arguments and its results must
    pickle. The default process group exists when it is called, so `torch.distributed.get_rank()`
    distinguishes ranks, and the variables that torchrun sets are set; Megatron has been imported,
    with the CPU device where there is no CUDA. `env` is added to the ranks' environment.

    The first exception of any rank is raised here with the rank and its traceback as a note,
    after `timeout` seconds a `TimeoutError` that says where each unfinished rank stood.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        **_network(),
        **(env or {}),
        **SINGLE_THREADED,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// joins this process's store
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, SINGLE_THREADED, PYTHONPATH=os.fspath(ROOT)):
        forkserver.ensure_running()

    call = pickle.dumps((fn, args))
    ranks: list[BaseProcess] = []
    pipes: list[connection.Connection] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as stacks:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, call, rank, environment, timeout, stacks),
                    name=f"rank{rank}",
                )
                process.start()
                theirs.close()
                ranks.append(process)
                pipes.append(ours)
            results = _collect(ranks, pipes, time.monotonic() + timeout, timeout, Path(stacks))
            for pipe in pipes:
                pipe.send_bytes(b"leave")
            for rank_process in ranks:
                rank_process.join(10)
            return results
        finally:
            for rank_process in ranks:
                _kill_group(rank_process)
            for pipe in pipes:
                pipe.close()


def torchrun(
    args: Sequence[str | os.PathLike[str]],
    nproc: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node nproc *args` from the repository root.

    `python` runs the launcher and the ranks: `tests.warm.warm_python()` saves their imports.

    Returns the completed process, whatever its exit status, with stdout and stderr as text.
    After `timeout` seconds everything it started is killed and a `TimeoutError` shows the end of
    its output.
    """
    command = [
        *(python, "-m", "torch.distributed.run"),
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc)),
        *(os.fspath(arg) for arg in args),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **_network(), **SINGLE_THREADED, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_tree(process.pid)
        stdout, stderr = process.communicate()
        raise TimeoutError(
            f"torchrun of {args[0]} with {nproc} ranks did not end within {timeout:g} s\n"
            f"--- stdout\n{stdout[-4000:]}\n--- stderr\n{stderr[-4000:]}"
        ) from None
    finally:
        if process.poll() is None:
            _kill_tree(process.pid)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _network() -> dict[str, str]:
    """Restrict gloo to the loopback interface, as a container's host name may not resolve."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def _rank_main(
    pipe: connection.Connection,
    call: bytes,
    rank: int,
    environment: dict[str, str],
    timeout: float,
    stacks: str,
) -> None:
    os.setpgid(0, 0)  # whatever this rank starts is killed with it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stack_file = open(_stack_file(Path(stacks), rank), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGQUIT, file=stack_file)
    preloaded = sys.modules.get("tests.preload")
    os.environ.clear()
    os.environ.update(preloaded.ENVIRONMENT if preloaded else {})
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        # Longer than the parent waits, so that the parent reports a hang.
        dist.init_process_group("gloo", timeout=timedelta(seconds=2 * timeout + 60))
        fn, args = pickle.loads(call)
        message = pickle.dumps((True, fn(*args)))
    except BaseException as error:
        message = pickle.dumps((False, _picklable(error), traceback.format_exc()))
    pipe.send_bytes(message)
    # A rank that left now could break a collective that others are still in.
    pipe.recv_bytes()
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect(
    ranks: list[BaseProcess],
    pipes: list[connection.Connection],
    deadline: float,
    timeout: float,
    stacks: Path,
) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = [
            pipe
            for pipe in connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if isinstance(pipe, connection.Connection)
        ]
        if not ready:
            running = sorted(waiting.values())
            raise TimeoutError(
                f"ranks {running} of {len(ranks)} still ran after {timeout:g} s\n"
                + _stacks(ranks, running, stacks)
            )
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, *outcome = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                _raise_if_dead(ranks, 5)
                raise RuntimeError(f"rank {rank} of {len(ranks)} closed its pipe") from None
            if not succeeded:
                # A rank that dies reports nothing; its peers may report their broken connections
                # to it before its end is noticed. Ranks that have reported are still alive.
                _raise_if_dead(ranks, 0.2)
                error, trace = outcome
                error.add_note(f"on rank {rank} of {len(ranks)}:\n{trace}")
                raise error
            results[rank] = outcome[0]
    return [results[rank] for rank in range(len(ranks))]


def _raise_if_dead(ranks: list[BaseProcess], within: float) -> None:
    ended = connection.wait([process.sentinel for process in ranks], within)
    dead = {rank: process for rank, process in enumerate(ranks) if process.sentinel in ended}
    if dead:
        died = ", ".join(f"rank {rank} (exit code {p.exitcode})" for rank, p in dead.items())
        raise RuntimeError(f"died without an exception: {died} of {len(ranks)}")


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"


def _stacks(ranks: list[BaseProcess], running: list[int], folder: Path) -> str:
    for rank in running:
        os.kill(_pid(ranks[rank]), signal.SIGQUIT)
    time.sleep(0.5)
    files = {rank: _stack_file(folder, rank) for rank in running}
    return "\n".join(f"rank {rank}:\n{f.read_text()}" for rank, f in files.items() if f.exists())


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def _kill_group(process: BaseProcess) -> None:
    process.kill()
    process.join()
    try:
        os.killpg(_pid(process), signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.close()


def _kill_tree(pid: int) -> None:
    """Kill a process and its descendants; torchrun's workers are in sessions of their own."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
