"""Tests that a command behaves in the warm interpreter as in the real one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed import HAS_GPU, ROOT, SINGLE_THREADED
from tests.warm import warm_python

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a process with CUDA cannot be forked")

# A program within the repository, which is what the warm interpreter forks.
PROGRAM = """
import os, sys, threading, time
print(sys.argv[1:], os.getcwd(), os.environ.get("WARM_TEST"), sys.stdin.read(), flush=True)
print("torch" in sys.modules, os.environ["OMP_NUM_THREADS"], threading.active_count(), flush=True)
print("to stderr", file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.fixture
def program() -> Iterator[Path]:
    file = ROOT / "runs" / f"warm_{os.getpid()}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(PROGRAM)
    yield file
    file.unlink()


def run(
    program: Path, code: str, folder: Path, python: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python or warm_python(), str(program), code],
        cwd=folder,
        env={**os.environ, **SINGLE_THREADED, "WARM_TEST": "set"},
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_arguments_folder_environment_and_streams_reach_the_command(program, tmp_path):
    done = run(program, "pass", tmp_path)
    first, second = done.stdout.splitlines()
    assert first == f"['pass'] {tmp_path} set typed"
    assert second == "True 1 1"
    assert (done.stderr, done.returncode) == ("to stderr\n", 0)


@pytest.mark.parametrize(
    "code, status",
    [
        ("sys.exit(3)", 3),
        ("sys.exit('a message')", 1),
        ("1 / 0", 1),
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_exit_status_and_errors_are_those_of_the_real_interpreter(program, tmp_path, code, status):
    done = run(program, code, tmp_path)
    real = run(program, code, tmp_path, python=sys.executable)
    assert done.returncode == real.returncode == status
    assert done.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_signals_are_forwarded_and_a_killed_client_takes_its_command_along(program, tmp_path):
    pid = tmp_path / "pid"
    code = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid.unlink(missing_ok=True)
        command = [warm_python(), str(program), code]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == -number
        while psutil.pid_exists(int(pid.read_text())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not psutil.pid_exists(int(pid.read_text()))


def test_warm_python_runs_other_programs_in_the_real_interpreter():
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{sys.executable} False\n"
