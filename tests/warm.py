"""A Python interpreter for tests that has imported torch, Megatron and transformers already.

Starting a command costs five seconds of imports, and the tests start hundreds. `warm_python`
returns a program that takes the arguments of Python. It runs the commands of this repository in a
fork of a server that has imported the libraries, with the caller's arguments, working directory,
environment, standard streams and exit status, and hands everything else to the real interpreter.

The server is single-threaded, because a fork copies the locks of other threads but not the
threads. On a machine with CUDA nothing is forked and `warm_python` is the real interpreter.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import psutil

from tests.distributed import HAS_GPU, ROOT, SINGLE_THREADED

# The client starts with no site-packages and forwards what a process can do to another one.
_CLIENT = r"""#!{python} -IS
import json, os, signal, socket, sys

words, unbuffered = sys.argv[1:], "PYTHONUNBUFFERED" in os.environ
if words[:1] == ["-u"]:
    words, unbuffered = words[1:], True
roots = ("tools", "alignment", "examples", "torch.distributed.run")
module = words[1] if words[:1] == ["-m"] and len(words) > 1 else ""
known = module in roots or module.split(".")[0] in roots[:3]
if words and words[0].endswith(".py"):
    known = os.path.realpath(words[0]).startswith({root!r} + "/")
path = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry]
other = [key for key in ("PYTHONHASHSEED", "PYTHONSAFEPATH", "PYTHONOPTIMIZE") if key in os.environ]
if not known or other or any(entry != {root!r} for entry in path):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
             signal.SIGUSR2)
for number in forwarded:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
request = json.dumps([words, os.getcwd(), dict(os.environ), unbuffered])
request = request.encode("utf-8", "surrogateescape")
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
for fd in (0, 1, 2):
    os.close(fd)
answer = server.recv(16)
status = int(answer) if answer else 1
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def warm_python() -> str:
    """Return the path of the program, having started the server of this process."""
    if HAS_GPU:
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address, program = folder / "server", folder / "python"
    text = _CLIENT.format(python=sys.executable, root=os.fspath(ROOT), address=os.fspath(address))
    program.write_text(text)
    program.chmod(0o755)
    for name, module in (("torchrun", "torch.distributed.run"), ("et-align", "alignment")):
        shim = folder / name
        shim.write_text(f'#!/bin/sh\nexec "{program}" -m {module} "$@"\n')
        shim.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.warm import serve; serve()", address, program],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.fspath(ROOT)},
        stdin=subprocess.PIPE,  # never written to; its end ends the server
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "the server of warm Pythons did not start"
    return os.fspath(program)


def warm_path() -> str:
    """Return a PATH whose first `python`, `torchrun` and `et-align` are warm."""
    folders = [os.path.dirname(warm_python()), os.path.dirname(sys.executable)]
    return os.pathsep.join([*folders, os.environ["PATH"]])


def serve() -> None:
    """Fork a process for every connection until standard input ends; return in no parent."""
    address, program = sys.argv[1:]
    from tests import preload

    for name in ("rich.console", "matplotlib.pyplot", "scipy.stats",
                 "httpx", "uvicorn", "starlette.applications", "pydantic",
                 "sentencepiece", "zstandard"):  # fmt: skip
        __import__(name)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[int, socket.socket] = {}  # by process id
    with selectors.DefaultSelector() as selector:
        for source in (listener, wake_read, 0):
            selector.register(source, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    for pid in clients:
                        _kill_tree(pid)
                    os._exit(0)
                elif key.fileobj == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    _reap(clients, selector)
                elif key.fileobj is listener:
                    client = listener.accept()[0]
                    request, fds = _receive(client)
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        selector.close()
                        for open_one in (client, listener, *clients.values()):
                            open_one.close()
                        os.close(wake_read)
                        os.close(wake_write)
                        _run(request, fds, program, preload.ENVIRONMENT)
                    for fd in fds:
                        os.close(fd)
                    clients[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                else:
                    _forward(key.data, clients[key.data], selector)


def _receive(client: socket.socket) -> tuple[list[Any], list[int]]:
    length, fds, _, _ = socket.recv_fds(client, 8, 3)
    size, parts = int.from_bytes(length, "big"), b""
    while len(parts) < size:
        parts += client.recv(size - len(parts))
    return json.loads(parts.decode("utf-8", "surrogateescape")), fds


def _forward(pid: int, client: socket.socket, selector: selectors.BaseSelector) -> None:
    """Send the process the signals that its client received; kill it if its client is gone."""
    try:
        numbers = client.recv(64)
    except ConnectionResetError:
        numbers = b""
    for number in numbers:
        os.kill(pid, number)
    if not numbers:
        _kill_tree(pid)
        selector.unregister(client)


def _reap(clients: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        client = clients.pop(pid)
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(client)
        with contextlib.suppress(OSError):
            client.send(b"%d" % os.waitstatus_to_exitcode(status))
        client.close()


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _run(request: list[Any], fds: list[int], program: str, environment: dict[str, str]) -> None:
    """Become the command, as the interpreter does, and exit."""
    words, folder, variables, unbuffered = request
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    sys.stdout.reconfigure(write_through=unbuffered, line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(variables)
    if "PYTHONWARNINGS" in variables:
        warnings._processoptions(variables["PYTHONWARNINGS"].split(","))  # type: ignore[attr-defined]
    sys.executable = program
    status: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = folder
            runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        else:
            sys.argv = words
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((status or 0) & 0xFF)
