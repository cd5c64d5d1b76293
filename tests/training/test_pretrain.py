"""Tests of `pretrain_et.py` as a command: resuming, recomputing, evaluating."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks, torchrun
from tests.megatron import TINY
from tests.pretraining import start, train

SPEED = ("seconds", "tokens_per_s", "flops_per_s_per_device", "mfu")


def pretrain(run_dir: Path, *flags: str, nproc: int = 2) -> list[dict[str, Any]]:
    """Train, and return the rows of metrics."""
    train([*TINY, "--run-dir", run_dir, *flags], nproc)
    return rows_of(run_dir)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the training rows of metrics.jsonl without the values that depend on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.get("val_loss", 1) > 0
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows if "loss" in row]


EP2 = ("--expert-model-parallel-size", "2", "--use-distributed-optimizer")


@pytest.mark.slow
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


ADAPTIVE = ("--et-threshold-estimator", "adaptive")


@pytest.mark.slow
def test_filters_of_thresholds_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", *EP2, *ADAPTIVE)
    assert whole != pretrain(tmp_path / "ema", *EP2)
    for step in ("1", "3"):
        pretrain(tmp_path / "parts", *EP2, *ADAPTIVE, "--exit-interval", step)
    assert pretrain(tmp_path / "parts", *EP2, *ADAPTIVE) == whole


@pytest.mark.slow
def test_filters_start_at_the_moving_average_of_a_run(tmp_path: Path) -> None:
    folder, thresholds = tmp_path / "run", "moe/layer_01/experts/threshold"
    ema = pretrain(tmp_path / "whole", nproc=1)
    pretrain(folder, "--exit-interval", "3", nproc=1)
    command = ["--num-workers", "0", *TINY, "--run-dir", folder]
    [(code, printed)] = run_ranks(start, 1, [*command, *ADAPTIVE], timeout=240)
    assert code == 0, printed
    assert "the filters of adaptive start at its thresholds" in printed
    rows = rows_of(folder)
    assert rows[3][thresholds] == ema[3][thresholds]  # the step routes by the average
    assert rows[4][thresholds] != ema[4][thresholds]
    [(code, printed)] = run_ranks(start, 1, command, timeout=240)
    assert code == 2
    assert "do not have the moving average that ema continues. Use adaptive." in printed


@pytest.mark.slow
def test_recomputation_and_evaluation_change_nothing(tmp_path: Path) -> None:
    plain = pretrain(tmp_path / "plain", nproc=1)
    full = ("--recompute-granularity", "full", "--recompute-method", "uniform")
    recomputed = pretrain(tmp_path / "recomputed", *full, "--recompute-num-layers", "1", nproc=1)
    assert recomputed == plain
    evaluated = pretrain(tmp_path / "evaluated", "--eval-interval", "1", nproc=1)
    assert evaluated == plain


@pytest.mark.slow
def test_pretrain_with_every_router_resumes_expert_choice_by_thresholds(tmp_path: Path) -> None:
    topk = ("--moe-router-pre-softmax", "--moe-aux-loss-coeff", "1e-3")
    for router_type, flags in {
        "expert-choice": (),
        "token-choice": topk,
        "quantile-balancing": topk[:1],
    }.items():
        folder = tmp_path / router_type
        rows = pretrain(
            folder, "--router-type", router_type, *flags, "--exit-interval", "3", nproc=1
        )
        assert rows[-1]["loss"] < rows[0]["loss"]
        fan_out = rows[-1]["moe/layer_01/fan_out"]
        assert fan_out == pytest.approx(1.0)  # all places of the experts are used
    rows = pretrain(tmp_path / "expert-choice", "--router-type", "expert-threshold", nproc=1)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The thresholds of the first three steps route the fourth: the fan-out is no longer exact.
    assert rows[3]["moe/layer_01/fan_out"] != pytest.approx(1.0)
    assert rows[3]["moe/layer_01/threshold"] == pytest.approx(
        rows[2]["moe/layer_01/threshold"], abs=0.2
    )


@pytest.mark.slow
def test_metrics_of_a_run_that_diverges_are_json(tmp_path: Path) -> None:
    flags = ("--lr", "1e30", "--min-lr", "1e29", "--no-check-for-nan-in-loss-and-grad")
    train([*TINY, "--run-dir", tmp_path, *flags, "--eval-interval", "3"], 1)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(4.85, abs=0.5) and losses[-1] == "NaN"
    assert {"step": 6, "val_loss": "NaN"} in rows and {"step": 6, "test_loss": "NaN"} in rows


@pytest.mark.slow
def test_pretrain_of_a_llama_like_mixture(tmp_path: Path) -> None:
    """Every part of the paper's model has a flag that turns it into the usual one."""
    base = {*TINY} - {"--squared-relu", "--untie-embeddings-and-output-weights", "--qk-layernorm"}
    llama = [flag for flag in TINY if flag in base]
    arguments = [
        *("pretrain_et.py", *llama, "--run-dir", str(tmp_path), "--swiglu", "--et-norm-scale"),
        *("--no-et-embedding-norm", "--et-logit-softcap", "0", "--et-gate", "softmax"),
        *("--group-query-attention", "--num-query-groups", "1", "--et-mean-experts", "1.5"),
        *("--et-cutoff-pool", "step", "--et-capacity-pool", "global", "--rotary-base", "500000"),
    ]
    result = torchrun(arguments, 2)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert rows[0]["moe/layer_01/fan_out"] == pytest.approx(1.5)
