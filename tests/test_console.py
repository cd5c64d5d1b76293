"""Tests of the console of a training process: the output of the terminal and of the log."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.report_lines import RemainingTime, clock, report_line, short, step_of
from tests.distributed import ROOT

BEGIN = """
import os, sys, warnings, logging
from pathlib import Path
from megatron_ext.console import console
console.capture()
print("before the log")
"""


def run(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


OWN = "megatron: an error\na warning\n"


def test_all_other_output_goes_to_the_log_in_its_order(tmp_path: Path) -> None:
    log = tmp_path / "run" / "train.log"
    done = run(
        """
console.log_to(Path(sys.argv[1]))
print("from print")
os.write(2, b"from C++\\n")
logging.getLogger("megatron").warning("from logging")
logging.getLogger("megatron").error("an error")
warnings.warn("from warnings")
os.system("echo from a child")
console.line("step 1", "bold")
console.warn("a warning")
console.status("step 2")
""",
        log,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 1\n", OWN)
    text = log.read_text()
    expected = ["before the log", "from print", "from C++", "from logging", "from warnings"]
    expected += ["from a child", "step 1", "a warning"]
    places = [text.index(part) for part in expected]
    assert places == sorted(places)
    assert "\x1b" not in text


def test_a_traceback_reaches_terminal_and_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    done = run("console.log_to(Path(sys.argv[1]))\nprint('noise')\n1 / 0", log)
    assert done.returncode == 1 and done.stdout == ""
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "noise" not in done.stderr
    assert "ZeroDivisionError: division by zero" in log.read_text()


def test_without_a_log_file_the_last_lines_come_before_the_traceback() -> None:
    done = run("print('cause')\n1 / 0")
    assert done.stderr.index("cause") < done.stderr.index("ZeroDivisionError")
    assert done.stderr.count("ZeroDivisionError") == 1


def test_a_fatal_signal_shows_where_the_process_was(tmp_path: Path) -> None:
    done = run("console.log_to(Path(sys.argv[1]))\nos.abort()", tmp_path / "train.log")
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr


def test_a_killed_process_leaves_a_complete_log(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    done = run(
        """
console.log_to(Path(sys.argv[1]))
for number in range(1000):
    print("line", number)
console.line("last")
os.kill(os.getpid(), 9)
""",
        log,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "last\n"
    lines = log.read_text().splitlines()
    assert lines == ["before the log", *(f"line {number}" for number in range(1000)), "last"]


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "as torchrun"])
def test_lines_of_several_processes_stay_whole(tmp_path: Path, unbuffered: list[str]) -> None:
    log = tmp_path / "train.log"
    text = BEGIN + (
        "console.log_to(Path(sys.argv[1]))\n"
        "for number in range(300):\n    print(sys.argv[2] * 100)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, *unbuffered, "-c", text, log, letter], cwd=ROOT)
        for letter in "ab"
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 602
    assert set(lines) == {"a" * 100, "b" * 100, "before the log"}


def test_a_log_is_continued(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    for _ in range(2):
        assert run("console.log_to(Path(sys.argv[1]))", log).returncode == 0
    assert log.read_text() == "before the log\n" * 2


def test_a_closed_pipe_does_not_end_the_process(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    text = BEGIN + "console.log_to(Path(sys.argv[1]))\nfor _ in range(9):\n    console.line('step')"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, "-c", text, log], cwd=ROOT, stdout=write)
    os.close(write)
    assert process.wait(60) == 0
    assert log.read_text().count("step") == 9


def test_a_terminal_shows_rewritten_and_colored_lines(tmp_path: Path) -> None:
    text = BEGIN + (
        "console.log_to(Path(sys.argv[1]))\n"
        "console.status('step 1')\nconsole.status('step 2')\nconsole.alarm('ALARM [x]')\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", text, tmp_path / "train.log"],
        cwd=ROOT, stdout=follower, stderr=follower, env=environment,
    )  # fmt: skip
    assert process.wait(60) == 0
    os.close(follower)
    output = b""
    try:
        while part := os.read(leader, 4096):
            output += part
    except OSError:  # the end
        pass
    os.close(leader)
    # The size of the terminal is unknown to a pty until it is set: lines may be cut.
    assert output.count(b"\r\x1b[K") == 2
    # Older versions of rich style the end of the line, too.
    assert re.search(rb"\x1b\[1;31mALARM \[x\]\x1b\[0m(\x1b\[1;31m)?\r\n(\x1b\[0m)?$", output)


def test_remaining_time_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    left = RemainingTime(1000)
    assert str(left) == "remaining time unknown"
    for step in range(300):
        now += 5.0 if step < 150 else 2.0  # the first steps compile
        left.finish_step(step)
    assert left.seconds == pytest.approx((1000 - 299) * 2.0)
    assert str(left) == "0:23:22 left"


def test_numbers_are_short_and_aligned() -> None:
    assert [clock(0.4), clock(59.6), clock(90061)] == ["0:00:00", "0:01:00", "1 d 1:01:01"]
    assert [short(2_303_360), short(575e6), short(1.25e12)] == ["2.30 M", "575 M", "1.25 T"]
    assert step_of(7, 1000) == "step     7/1,000"
    assert report_line(["a", "", "b"], ["c", "d"]) == "a | b | ATTENTION: c, d"


def test_what_libraries_write_to_stdout_is_discarded() -> None:
    text = (
        "import os\nfrom megatron_ext.quiet import quiet_libraries\nprint('before')\n"
        "with quiet_libraries():\n    os.write(1, b'of a library')\nprint('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "")
