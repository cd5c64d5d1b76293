"""Tests of the console and the logs of `pretrain_et.py`, and of the metrics of its trackers."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import ROOT, SINGLE_THREADED
from tests.documented_metrics import undocumented
from tests.megatron import TINY
from tests.warm import warm_python


def pretrain(*flags: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [warm_python(), "pretrain_et.py", *TINY, *map(str, flags)],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def tags(run: Path) -> dict[str, list[int]]:
    """Return the steps of each tag in TensorBoard."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return {tag: sorted(steps) for tag, steps in (scalars | images).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return the folder and both streams of a run of six steps with a checkpoint after four."""
    run = tmp_path_factory.mktemp("console") / "run"
    flags = ("--save-interval", 4, "--eval-interval", 3, "--eval-iters", 1)
    done = pretrain("--run-dir", run, *flags)
    return run, done.stdout, done.stderr


def test_a_run_prints_one_line_per_report(finished: tuple[Path, str, str]) -> None:
    run, stdout, stderr = finished
    assert stderr == ""
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["Run", "Data", "Model", "Layout"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens/s" in line]
    assert len(steps) == 6
    for line, row in zip(steps, [row for row in rows if "loss" in row], strict=True):
        assert line.startswith(f"step {row['step']}/6 | loss {row['loss']:.4f} | ")
        assert f"fan-out {row['moe/layer_01/fan_out']:.2f} | " in line
        assert f"largest load {row['moe/layer_01/load_max_over_mean']:.1f}x" in line
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    assert f"step 3/6 | validation loss {validation[0]:.4f}" in lines
    assert lines[-3].startswith("Finished 6 steps")
    assert f"training {rows[-4]['loss']:.4f}, validation {validation[-1]:.4f}" in lines[-2]
    assert lines[-1] == f"Report   python -m tools.report --run-dir {run}"
    assert len(lines) <= 4 + 6 + 4 + 3
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_all_other_output_is_in_the_log(finished: tuple[Path, str, str]) -> None:
    log = (finished[0] / "train.log").read_text()
    for part in (
        "end of arguments",
        "iteration        6/       6",
        "saving checkpoint",
        "step 6/6",
    ):
        assert part in log


def test_trackers_have_means_over_layers_and_a_picture(finished: tuple[Path, str, str]) -> None:
    run = finished[0]
    scalars = tags(run)
    assert scalars["loss"] == scalars["moe/fan_out"] == [1, 2, 3, 4, 5, 6]
    assert scalars["val_loss"][:2] == [3, 6]
    assert scalars["moe/expert_load"] == [1, 2, 3, 4, 5, 6]
    assert not any(tag.startswith("moe/layer_") for tag in scalars)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert undocumented([*rows, scalars]) == set()


def test_a_resumed_run_sends_no_step_twice(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "iter_0000006")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    flags = ("--eval-interval", 3, "--eval-iters", 1, "--log-layers")
    lines = pretrain("--run-dir", run, "--save-interval", 4, *flags).stdout.splitlines()
    assert any(line.startswith("Resumes  after step 4, 1,024 tokens") for line in lines)
    assert [line[:8] for line in lines if "tokens/s" in line] == ["step 5/6", "step 6/6"]
    scalars = tags(run)
    assert (
        scalars["loss"]
        == scalars["moe/fan_out"]
        == scalars["moe/expert_load"]
        == [1, 2, 3, 4, 5, 6]
    )
    assert "moe/layer_01/fan_out" not in scalars


def test_alarms_end_the_line_of_a_report() -> None:
    from megatron_ext.training.run_console import _Interval

    row = {
        "batch_size": 8, "seq_length": 32, "seconds": 1.0, "skipped": False, "loss": float("nan"),
        "grad_norm": 1.0,
    }  # fmt: skip
    figures = {
        "fan_out": 1.0, "largest_load": 3.0, "starvation": 0.7, "all_dead_experts": 2.0,
        "no_expert_share": 0.6,
    }  # fmt: skip
    interval = _Interval()
    interval.add(row, figures, 0.5)
    interval.add(row | {"skipped": True}, figures, 0.5)
    line, alarms = interval.report("step 2/9", "0:00:07 left")
    assert alarms == [
        "loss or gradient is not a finite number",
        "1 of 2 steps skipped",
        "starvation 70%",
        "2 experts without a token",
        "60% of the tokens without an expert",
        "50% of the time waiting for data",
    ]
    assert line.startswith("step 2/9 | loss nan | 256 tokens/s | 0:00:07 left | fan-out 1.00 | ")
    assert line.endswith("ATTENTION: " + ", ".join(alarms))
    interval = _Interval()
    interval.add(row | {"loss": 1.0}, figures | dict.fromkeys(list(figures)[2:], 0.0), 0.1)
    assert interval.report("step 3/9", "")[1] == []
