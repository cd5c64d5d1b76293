"""The same seed and data give the same losses, cutoffs and thresholds on every layout.

Each layout trains with `pretrain_et.py` on real ranks, first by expert choice and then by
thresholds, and is compared with one rank. Expert choice pools a micro-batch over the data-parallel
ranks, so micro-batch times data-parallel size is the same everywhere.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, run_ranks
from tests.megatron import TINY

STEPS = 20
SAME = [
    *("--num-layers", "4", "--moe-layer-freq", "[0,1,1,1]", "--train-iters", str(STEPS)),
    *("--et-warmup-iters", "8", "--et-capacity-pool", "global", "--et-capacity", "0.1"),
]
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP2 = ("--expert-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")

# name: ranks, data-parallel size, flags
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "DP 2": (2, 2, ()),
    "DP 4": (4, 4, ()),
    "DP 2, distributed optimizer, overlap": (
        2,
        2,
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "EP 2": (2, 2, EP2),
    "EP 2, all-gather dispatcher": (2, 2, (*EP2, "--moe-token-dispatcher-type", "allgather")),
    "EP 4": (4, 4, ("--expert-model-parallel-size", "4")),
    "TP 2, expert TP 2": (2, 1, TP2),
    "TP 2, EP 2": (2, 1, (*TP2, *EP2, "--expert-tensor-parallel-size", "1")),
    "CP 2": (2, 1, ("--context-parallel-size", "2")),
    "CP 2, TP 2, EP 2": (4, 1, ("--context-parallel-size", "2", *TP2, *EP2)),
    "PP 2": (2, 1, PP2),
    "PP 2, interleaved": (2, 1, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
    "TP 2, DP 2, EP 2": (4, 2, (*TP2, *EP2, "--use-distributed-optimizer")),
    "full recomputation": (1, 1, (*FULL, "--recompute-num-layers", "1")),
    "recomputed MoE layers": (
        1,
        1,
        ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    ),
}


def _train(flags: list[str]) -> None:
    sys.argv = [str(ROOT / "pretrain_et.py"), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(sys.argv[0], run_name="__main__")


def train(run_dir: Path, ranks: int, data_parallel: int, flags: tuple[str, ...]) -> list[Any]:
    """The training rows of a run; 4 samples a micro-batch of all ranks, 2 micro-batches a step."""
    batch = ["--micro-batch-size", str(4 // data_parallel), "--run-dir", str(run_dir)]
    run_ranks(_train, ranks, [*TINY, *SAME, *batch, *flags], timeout=200)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    rows = train(tmp_path_factory.mktemp("one"), 1, 1, ())
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    saturations = [row["moe/layer_01/saturation"] + row["moe/layer_01/starvation"] for row in rows]
    assert max(saturations[8:]) > 0  # the capacity is at work
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_rank_does(name: str, one_rank: list[Any], tmp_path: Path) -> None:
    rows = train(tmp_path, *LAYOUTS[name])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, one_rank):
        assert row.keys() == expected.keys()
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4)
        for key, value in expected.items():
            if "threshold" in key or "cutoff" in key:
                assert row[key] == pytest.approx(value, abs=1e-4), (row["step"], key)
            if key.endswith("fan_out_histogram"):
                assert sum(row[key]) == sum(value) == 8 * 32
