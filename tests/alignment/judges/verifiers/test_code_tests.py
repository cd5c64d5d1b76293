"""Tests of programs in responses: results, and actions that the confinement denies."""

import json
import os
import subprocess
import sys
import time

import pytest

from alignment.judges.verifiers import code_tests
from alignment.judges.verifiers.code_tests import (
    InputTest,
    Limits,
    extract_code,
    read_tests,
    run_tests,
)

SQUARE = ["assert f(2) == 4", "assert f(3) == 9"]


def run(program, tests=("assert f(2) == 4",), timeout=20.0):
    return run_tests(program, list(tests), Limits(timeout))


def test_each_test_counts_and_a_program_must_reach_its_end():
    assert run("def f(x): return x * x", SQUARE).passed == [True, True]
    assert run("def f(x): return x + 2", SQUARE).passed == [True, False]
    for program in (
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x: return",
        "1 / 0",
        "",
    ):
        assert run(program).passed == [False], program
    assert run("def f(x): raise SystemExit(0)").passed == [False]
    assert run("def f(x): return f(x)").problem.startswith("RecursionError")
    assert run("if __name__ == '__main__': input()\ndef f(x): return 4").passed == [True]


def test_inputs_with_outputs_are_compared_without_space_at_the_ends():
    tests = [InputTest("2\n", "4  \n\n"), InputTest("3", "9"), InputTest("3", "8")]
    result = run("if __name__ == '__main__':\n    n = int(input())\n    print(n * n)", tests)
    assert result.passed == [True, True, False]
    assert run("print(4)\nraise ValueError", [InputTest("", "4")]).passed == [False]
    size = 3_000_000
    assert run("print(len(open(0).read()))", [InputTest("é" * size, str(size))]).passed == [True]


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.setsid()",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.sched_setaffinity(os.getppid(), {0})",
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import os\nos.execv('/bin/true', ['true'])",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))",
        "x = 'x' * (4 << 30)",
    ],
)  # fmt: skip
def test_a_program_cannot_reach_other_processes_or_lift_its_limits(program):
    result = run(f"{program}\ndef f(x): return 4")
    assert result.passed == [False]
    assert result.problem.startswith(("PermissionError", "MemoryError", "ValueError")), result
    wrapped = "".join(f"    {line}\n" for line in program.splitlines())
    survivor = f"try:\n{wrapped}except BaseException: pass\ndef f(x): return 4"
    assert run(survivor).passed == [True]


def test_files_of_others_are_neither_written_nor_read_nor_changed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("1")
    for change in (
        f"open({str(precious)!r}, 'w').write('x')", f"os.unlink({str(precious)!r})",
        f"os.chmod({str(precious)!r}, 0)", f"os.rename({str(precious)!r}, '/tmp/x')",
        "open('mine', 'w').write('x' * 10**6)", f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
    ):  # fmt: skip
        program = f"import os\ntry: {change}\nexcept OSError: pass\ndef f(x): return 4"
        assert run(program).passed == [True], change
    assert precious.read_text() == "1" and os.access(precious, os.W_OK)
    new = tmp_path / "new"
    assert not new.exists() or not new.stat().st_size  # without Landlock only an empty file
    result = run(f"open({str(precious)!r}).read()\ndef f(x): return 4")
    assert result.lacking or result.problem.startswith("PermissionError")


def test_a_program_inherits_no_secret(monkeypatch):
    monkeypatch.setenv("MEGATRON_ET_JUDGE_API_KEY", "secret")
    program = "import os\nassert 'secret' not in os.environ.values()\ndef f(x): return 4"
    assert run(program).passed == [True]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "while True: print('x' * 10**6)",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(1000)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "def f(x): time.sleep(1000)",
    ],
)
def test_a_program_that_hangs_is_ended_by_the_time_limit(program):
    begin = time.monotonic()
    result = run(program, timeout=1.5)
    assert result.passed == [False] and "time" in result.problem
    assert time.monotonic() - begin < 15


def test_output_of_a_program_is_bounded_and_not_its_result():
    result = run("while True: print('x' * 10**6)", [InputTest("", "x")])
    assert result.passed == [False] and result.problem == "more than 4 MiB were printed"
    assert run("print('passed 0')\nimport os; os._exit(0)").passed == [False]


def test_no_process_of_a_program_remains():
    run(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        timeout=1.5,
    )
    runner = str(code_tests._RUNNER)
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    own = [line for line in running.splitlines() if runner in line]
    assert not [line for line in own if int(line.split()[0]) == os.getpid()], own


def test_a_program_ends_with_the_command_that_started_it(tmp_path):
    command = (
        "from alignment.judges.verifiers.code_tests import Limits, run_tests\n"
        "run_tests('import time\\ntime.sleep(77)', ['1'], Limits(60.0))"
    )
    parent = subprocess.Popen([sys.executable, "-c", command])
    deadline = time.monotonic() + 60
    while not (children := _children(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # until the runner has set its limits
    parent.kill()
    parent.wait()
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(map(_alive, children))


def _children(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    return [int(child) for child in open(path).read().split()] if os.path.exists(path) else []


def _alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "text, expected",
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First\n```py\nx = 1\n```\nbetter\n```\nx = 2\n```\nDone.", "x = 2\n"),
        ("```python\nx = 1\n```\nOutput:\n```text\n1\n```", "x = 1\n"),
        ("```bash\nls\n```", None), ("x = 1", None), ("", None), ("```python\nx = 1", None),
        ("  ```Python title=a\n  x = 1\n  ```", "x = 1\n"),
    ],
)  # fmt: skip
def test_the_last_block_of_python_is_the_program(text, expected):
    assert extract_code(text) == expected


def test_forms_of_tests():
    io = [InputTest("1", "2"), InputTest("3", "4")]
    rows = [{"input": "1", "output": "2"}, {"input": 3, "output": 4}]
    columns = {"inputs": ["1", "3"], "outputs": ["2", "4"]}
    for value in (rows, columns, json.dumps(rows), json.dumps(columns)):
        assert read_tests(value) == io
    assert read_tests("assert 1") == ["assert 1"]
    assert read_tests(["assert 1", "assert 2"]) == ["assert 1", "assert 2"]
    assert read_tests("[x] = [1]\nassert x") == ["[x] = [1]\nassert x"]
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    assert run("def sq(x): return x * x", read_tests(check, "sq")).passed == [True]
    assert run("def sq(x): return x", read_tests(check, "sq")).passed == [False]
    wrong: list[object] = ["", [], {}, 5, None, [1], [{"input": 1}], {"inputs": [1], "outputs": []}]
    for each in wrong:
        with pytest.raises(ValueError):
            read_tests(each)
