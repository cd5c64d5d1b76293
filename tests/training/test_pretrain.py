"""`pretrain_et.py` as a user runs it: resuming, recomputing, evaluating."""

import json
from pathlib import Path
from typing import Any

from tests.distributed import torchrun
from tests.megatron import TINY

SPEED = ("tokens_per_s", "flops_per_device", "mfu")


def pretrain(run_dir: Path, *flags: str, nproc: int = 2) -> list[dict[str, Any]]:
    """Train and return the training rows of metrics.jsonl, without what depends on the clock."""
    arguments = ["pretrain_et.py", *TINY, "--run-dir", str(run_dir), *flags]
    result = torchrun(arguments, nproc)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.get("val_loss", 1) > 0
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows if "loss" in row]


EP2 = ("--expert-model-parallel-size", "2", "--use-distributed-optimizer")


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = pretrain(tmp_path / "whole", *EP2)
    assert [row["step"] for row in undisturbed] == [1, 2, 3, 4, 5, 6]
    # Stopped once in the middle of the warm-up of 2 steps and once after it.
    pretrain(tmp_path / "parts", *EP2, "--exit-interval", "1")
    pretrain(tmp_path / "parts", *EP2, "--exit-interval", "4")
    resumed = pretrain(tmp_path / "parts", *EP2)
    assert resumed == undisturbed
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert len(record["commands"]) == 3


def test_recomputation_and_evaluation_change_nothing(tmp_path: Path) -> None:
    plain = pretrain(tmp_path / "plain", nproc=1)
    full = ("--recompute-granularity", "full", "--recompute-method", "uniform")
    recomputed = pretrain(tmp_path / "recomputed", *full, "--recompute-num-layers", "1", nproc=1)
    assert recomputed == plain
    evaluated = pretrain(tmp_path / "evaluated", "--eval-interval", "1", nproc=1)
    assert evaluated == plain
