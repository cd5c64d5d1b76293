"""Tests of steps, which leave nothing unfinished behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from examples.alignment.steps import align, training
from examples.quickstart import steps
from examples.quickstart.steps import Step, Stopped, failure, module, run_steps, stop_on_signals
from megatron_ext.errors import UserError
from tests.warm import warm_python


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_step_signal_at_its_start_leaves_no_process(
    signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = []

    class Slow(subprocess.Popen):
        def __init__(self, *arguments, **more) -> None:
            super().__init__(*arguments, **more)
            processes.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)  # nobody holds the process yet
            time.sleep(0.1)

    monkeypatch.setattr(steps.subprocess, "Popen", Slow)
    step = Step("sleeper", "sleeping", ["-c", "import time; time.sleep(60)"], tmp_path / "log")
    with pytest.raises(Stopped) as stopped:
        run_steps([step], tmp_path / "stamps")
    assert stopped.value.number == signal.SIGTERM
    assert len(processes) == 1 and not psutil.pid_exists(processes[0])
    assert not (tmp_path / "stamps" / "sleeper.done").exists()


def test_step_shows_the_sentence_of_et_align_alone_and_on_ranks(tmp_path: Path) -> None:
    launch = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    command = align("train-sft", "--model", tmp_path / "none", "--run-dir", tmp_path / "checks.py")
    for ranked in ([], module("torch.distributed.run", *launch)):
        command = [*ranked, *command]
        done = subprocess.run([warm_python(), *command], capture_output=True, text=True)
        assert done.returncode
        assert failure(command, done.stdout + done.stderr) == (
            f"et-align: --model {tmp_path / 'none'} is not a folder."
        )


def test_steps_go_on_after_one_that_made_a_file_and_not_after_a_wrong_command(
    tmp_path: Path,
) -> None:
    def step(name: str, code: str, fails: bool) -> Step:
        code = f"import sys; {code}; sys.exit({repr(f'{name} diverges') if fails else 0})"
        made = tmp_path / name
        return Step(name, "a step", ["-c", code], tmp_path / "log", makes=[made])

    def makes(name: str, fails: bool = False) -> Step:
        return step(name, f"open({str(tmp_path / name)!r}, 'w')", fails)

    stamps = tmp_path / "stamps"
    failures = run_steps([makes("a", fails=True), makes("b")], stamps, keep_going=True)
    assert list(failures) == ["a"] and failures["a"].startswith("a diverges (step a;")
    assert {path.name for path in stamps.glob("*.done")} == {"b.done"}
    with pytest.raises(UserError, match="c diverges"):
        run_steps([step("c", "pass", fails=True), makes("d")], stamps, keep_going=True)
    with pytest.raises(UserError, match="a diverges"):
        run_steps([makes("a", fails=True), makes("d")], stamps)
    assert not (tmp_path / "d").exists()


def test_reason_of_a_training_is_its_error_and_not_a_warning() -> None:
    command = module("torch.distributed.run", Path("folder", "pretrain_et.py"))
    lines = ["pretrain_et.py: warning: --a has no effect", "pretrain_et.py: --b is 3.", "====="]
    assert failure(command, "\n".join(lines)) == "pretrain_et.py: --b is 3."


def test_training_step_that_starts_again_keeps_no_earlier_file(tmp_path: Path) -> None:
    """A new start removes all files of the run's folder except for the log of the step."""
    step = training("policy", "", [], tmp_path / "run", "final", [])
    left = {place.name for place in step.resumes}
    written = ("alarms", "responses", "rollouts", "verdicts", "served", "validation", "first.json")
    assert left >= {*written, "samples.jsonl", "metrics.jsonl", "run.json", "checkpoints", "final"}
