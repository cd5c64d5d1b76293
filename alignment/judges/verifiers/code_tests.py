"""Tests of a Python program in a subprocess with limits, for programs that nobody has read."""

import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RUNNER = Path(__file__).with_name("code_runner.py")
_MOST_OUTPUT = 4 << 20  # bytes that are read of what a program prints
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL
)
_PYTHON = ("python", "py", "python3", "")


@dataclass(frozen=True)
class InputTest:
    """Test of a program by its output.

    Attributes:
        input: What the program reads from its standard input.
        output: What it is to print. Space at the end of lines and of the text does not count.
    """

    input: str
    output: str


@dataclass(frozen=True)
class Limits:
    """Limits of the tests of one response.

    Attributes:
        timeout: Seconds that all tests of a program may take together.
        memory: Most MiB of address space.
    """

    timeout: float = 10.0
    memory: int = 1024


@dataclass(frozen=True)
class TestResult:
    """Result of the tests of a program.

    Attributes:
        passed: Whether each test passed.
        problem: Why a test was not run to its end, or "".
        lacking: What this kernel cannot prevent a program from doing, or "".
    """

    __test__ = False  # for pytest

    passed: Sequence[bool]
    problem: str = ""
    lacking: str = ""


class CannotConfine(Exception):
    """Refusal to run a program, because this system cannot confine it."""


def extract_code(text: str) -> str | None:
    """Return the last block of Python between fences, or None.

    A block counts if its fence names Python or no language.
    """
    blocks = [code for language, code in _FENCE.findall(text) if language.lower() in _PYTHON]
    return textwrap.dedent(blocks[-1]) if blocks else None


def read_tests(value: Any, entry_point: str | None = None) -> list[str] | list[InputTest]:
    """Return the tests that a column holds.

    Args:
        value: Python code; a list of such; a list of objects with `input` and `output`; an object
            with the lists `inputs` and `outputs`; or the JSON of one of the last three.
        entry_point: Function that `check` of the code tests, as in HumanEval.

    Raises:
        ValueError: If it holds nothing of these.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # Python code may begin with a bracket
    if isinstance(value, dict) and {"inputs", "outputs"} <= set(value):
        inputs, outputs = value["inputs"], value["outputs"]
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        value = [{"input": i, "output": o} for i, o in zip(inputs, outputs)]
    if isinstance(value, str) and value.strip():
        calls_check = entry_point and re.search(r"^def check\(", value, re.MULTILINE)
        return [f"{value}\ncheck({entry_point})\n" if calls_check else value]
    if isinstance(value, list) and value:
        if all(isinstance(test, str) for test in value):
            return value
        if all(isinstance(t, dict) and {"input", "output"} <= set(t) for t in value):
            return [InputTest(_lines(t["input"]), _lines(t["output"])) for t in value]
    raise ValueError(f"no tests in {value!r:.60}")


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def run_tests(
    program: str, tests: Sequence[str] | Sequence[InputTest], limits: Limits = Limits()
) -> TestResult:
    """Return which tests a program passes.

    Args:
        program: The Python code.
        tests: Code that runs after the program in its namespace and raises an error if it fails,
            or inputs with outputs, each in a new process.
        limits: Limits of all tests together.

    Raises:
        CannotConfine: If this system cannot confine the program.
    """
    deadline = time.monotonic() + limits.timeout
    code = [test for test in tests if isinstance(test, str)]
    if code:
        process = _run({"program": program, "tests": code}, limits, deadline)
        passed = {int(line.split()[1]) for line in process.reports if line.startswith("passed")}
        each = [number in passed for number in range(len(code))]
        return TestResult(each, "" if all(each) else process.problem, process.lacking)
    results, problem, lacking = [], "", ""
    for test in tests:
        assert isinstance(test, InputTest)
        if time.monotonic() >= deadline:
            results.append(False)
            continue
        process = _run({"program": program, "input": test.input}, limits, deadline)
        right = not process.problem and _trimmed(process.output) == _trimmed(test.output)
        results.append(right)
        problem, lacking = problem or process.problem, process.lacking
    return TestResult(results, problem, lacking)


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@dataclass(frozen=True)
class _Process:
    output: str
    reports: Sequence[str]
    problem: str
    lacking: str


def _run(payload: dict[str, Any], limits: Limits, deadline: float) -> _Process:
    """Run the runner until it ends, prints too much or exceeds the time limit."""
    key = secrets.token_hex(16)
    payload = payload | {
        "key": key,
        "memory": limits.memory << 20,
        "cpu_seconds": int(limits.timeout) + 1,
    }
    with tempfile.TemporaryDirectory(prefix="code-tests-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            content, problem = _communicate(process, json.dumps(payload).encode(), deadline)
        finally:
            _kill(process)
    lines = content.decode(errors="replace").splitlines(keepends=True)
    reports = [line.removeprefix(key).strip() for line in lines if line.startswith(key)]
    if reports and reports[0].startswith("refused"):
        raise CannotConfine(reports[0].removeprefix("refused").strip())
    if not reports:
        raise CannotConfine(problem or f"Python ended with status {process.returncode}")
    errors = [r.removeprefix("error").strip() for r in reports if r.startswith("error")]
    if not problem and (errors or process.returncode):
        problem = errors[0] if errors else _end_of(process.returncode)
    output = "".join(line for line in lines if not line.startswith(key))
    return _Process(output, reports[1:], problem, reports[0].removeprefix("begin").strip())


def _communicate(
    process: "subprocess.Popen[bytes]", payload: bytes, deadline: float
) -> tuple[bytes, str]:
    """Send the payload and return what the process prints, and why it was not awaited."""
    assert process.stdin is not None and process.stdout is not None
    content, remaining = bytearray(), memoryview(payload)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(content), "the time limit was exceeded"
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    try:
                        remaining = remaining[os.write(key.fd, remaining) :]
                    except BrokenPipeError:
                        remaining = remaining[:0]
                    if not remaining:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(process.stdout)
                content += piece
                if len(content) > _MOST_OUTPUT:
                    return bytes(content), f"more than {_MOST_OUTPUT >> 20} MiB were printed"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(content), "the time limit was exceeded"
    return bytes(content), ""


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill everything in the session of a process, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _end_of(status: int) -> str:
    if status > 0:
        return "the program ended with an error"
    if -status == signal.SIGXCPU or -status == signal.SIGKILL:
        return "the limit of processor time was exceeded"
    return f"the program was ended by {signal.Signals(-status).name}"


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of a program, which has nothing of this process's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    fixed = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "PYTHONHASHSEED": "0"}
    return fixed | threads
