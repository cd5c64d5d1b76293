"""Tests of further starts of one run: they finish, are refused, or resume with other sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.reports.comparison.compared_runs import read_runs
from tests.distributed import run_ranks
from tests.megatron import TINY
from tests.pretraining import start, train

SMALL = [flag for flag in TINY if flag not in ("--mock-data", "--split", "90,5,5")]
OTHER_SCHEDULE = "--override-opt-param-scheduler"


def rows(run_dir: Path, name: str = "loss") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def refusal(*flags: object) -> tuple[int, str]:
    """Return the exit code and stderr of a start on one rank."""
    [ended] = run_ranks(start, 1, [*SMALL, *flags])
    return ended


@pytest.mark.slow
def test_resuming_with_other_sizes_and_intervals(dataset: Path, tmp_path: Path) -> None:
    blend = ["0.5", dataset, "0.5", dataset]
    data = ["--train-data-path", *blend, "--valid-data-path", *blend]
    run = [*SMALL, *data, "--run-dir", tmp_path / "run", "--lr-decay-style", "linear"]
    run += ["--min-lr", "0", "--eval-interval", "2"]
    train(run, ranks=1)
    first = rows(tmp_path / "run")
    assert [row["tokens"] for row in first] == [256 * step for step in range(1, 7)]
    assert first[-1]["lr"] == pytest.approx(0, abs=1e-12)
    record = (tmp_path / "run" / "run.json").read_text()

    # The same command again changes nothing.
    train(run, ranks=1)
    assert rows(tmp_path / "run") == first
    assert (tmp_path / "run" / "run.json").read_text() == record
    code, error = refusal(*data, "--run-dir", tmp_path / "run", "--finetune")
    assert code == 2 and "holds checkpoints of an earlier one" in error
    assert rows(tmp_path / "run") == first

    # Twice the batch, half the length, another interval, on two ranks.
    other = ["--train-iters", "8", "--global-batch-size", "16", "--seq-length", "16"]
    other += ["--eval-interval", "1", OTHER_SCHEDULE]
    train([*run, *other], ranks=2)
    later = rows(tmp_path / "run")
    assert later[:6] == first
    assert [row["tokens"] for row in later[6:]] == [1536 + 256, 1536 + 512]
    # 48 samples are trained on, 32 follow: half of these at 16 / 80 of the peak.
    assert later[6]["lr"] == pytest.approx(1e-2 * 16 / 80, rel=1e-6)
    assert later[7]["lr"] == pytest.approx(0, abs=1e-12)
    assert [row["step"] for row in rows(tmp_path / "run", "val_loss")][-3:] == [7, 8, 8]
    [whole] = read_runs([str(tmp_path / "run")])
    assert whole.tokens == 2048
    seconds = sum(row["seconds"] * (1 if row["step"] <= 6 else 2) for row in later)
    assert whole.work.device_seconds is not None and whole.work.flops is not None
    assert whole.work.device_seconds.sum() == pytest.approx(seconds, rel=1e-6)
    flops = sum(row["flops_per_token"] * 256 for row in later)
    assert whole.work.flops.sum() == pytest.approx(flops, rel=1e-6)
