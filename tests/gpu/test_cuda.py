"""Tests of training on CUDA devices against the CPU, and with and without faster kernels.

Every test is listed and run by `make gpu-test`, and skipped with its reason elsewhere.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import torchrun
from tests.megatron import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
needs_te = pytest.mark.skipif(not HAS_TE, reason="needs transformer-engine, see setup.py's gpu")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

# Sizes that tensor cores and fp8 kernels take.
MODEL = [
    *TINY,
    *("--hidden-size", "128", "--num-attention-heads", "4", "--seq-length", "64"),
    *("--max-position-embeddings", "64", "--moe-ffn-hidden-size", "128"),
    *("--ffn-hidden-size", "256", "--moe-shared-expert-intermediate-size", "128"),
    *("--num-layers", "3", "--moe-layer-freq", "[0,1,1]"),
    *("--train-iters", "20", "--et-warmup-iters", "6", "--lr", "1e-3", "--save", ""),
]
TE = ("--transformer-impl", "transformer_engine")
GROUPED = (*TE, "--moe-grouped-gemm")
FP8 = ("--bf16", "--fp8-format", "hybrid", "--moe-router-padding-for-quantization")
GRAPHS = ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn")
# With half the micro-batch on each of two devices, expert choice has the pool of one.
EP2 = ("--expert-model-parallel-size", "2", "--micro-batch-size", "1")


def train(
    run_dir: Path, *flags: str, ranks: int = 1, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the training rows of a short run."""
    command = ["pretrain_et.py", *MODEL, "--run-dir", str(run_dir), *flags]
    done = torchrun(command, ranks, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train on one CUDA device in fp32 with layers in plain torch."""
    return train(tmp_path_factory.mktemp("plain") / "run", "--transformer-impl", "local")


def compare(rows: list[dict[str, Any]], expected: list[dict[str, Any]], within: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        assert row["loss"] == pytest.approx(other["loss"], abs=within), row["step"]
        assert row["fan_out"] == pytest.approx(other["fan_out"], abs=max(0.05, 10 * within))


def test_a_gpu_trains_as_the_cpu_does(plain: list[dict[str, Any]], tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    compare(plain, train(tmp_path / "run", env=hidden), 1e-3)


@needs_te
@pytest.mark.parametrize(
    "flags, within",
    [
        pytest.param(TE, 2e-3, id="transformer engine"),
        pytest.param(GROUPED, 2e-3, id="grouped GEMM"),
        pytest.param((*GROUPED, "--moe-permute-fusion"), 2e-3, id="fused permutation"),
        pytest.param((*GROUPED, "--bf16"), 5e-2, id="bf16"),
        pytest.param((*GROUPED, *FP8), 2e-1, id="fp8, experts padded"),
        pytest.param((*GROUPED, "--moe-permute-fusion", *FP8), 2e-1, id="fp8, fused permutation"),
        pytest.param((*TE, "--te-rng-tracker", *GRAPHS, "--bf16"), 5e-2, id="attention captured"),
        pytest.param((*GROUPED, "--moe-shared-expert-overlap"), 2e-3, id="shared expert overlap"),
    ],
)
def test_kernels_of_transformer_engine(
    plain: list[dict[str, Any]], tmp_path: Path, flags: tuple[str, ...], within: float
) -> None:
    compare(train(tmp_path / "run", *flags), plain, within)


@needs_te
@pytest.mark.parametrize("router", ["expert-threshold", "token-choice"])
def test_capacity_off_and_on_route_as_on_the_cpu(tmp_path: Path, router: str) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    capacity = ("--et-capacity", "0.1") if router == "expert-threshold" else ()
    flags = ("--router-type", router, *capacity)
    on_cpu = train(tmp_path / "cpu", *flags, env=hidden)
    compare(train(tmp_path / "gpu", *flags, *GROUPED), on_cpu, 2e-3)


@needs_te
@needs_two
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((*EP2, "--use-distributed-optimizer"), id="EP 2"),
        pytest.param(("--tensor-model-parallel-size", "2", "--sequence-parallel"), id="TP 2"),
    ],
)
def test_two_gpus_train_as_one(
    plain: list[dict[str, Any]], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "--sequence-parallel" in flags else None
    compare(train(tmp_path / "run", *GROUPED, *flags, ranks=2, env=env), plain, 5e-2)


def test_the_routers_forward_does_not_wait_for_the_device() -> None:
    from fractions import Fraction

    from megatron_ext.moe.routing_metrics import RoutingCounts
    from megatron_ext.moe.thresholds import RoutingRate, Thresholds, select_by_threshold

    device = torch.device("cuda")
    logits = torch.randn(4096, 16, device=device)
    thresholds, counts = Thresholds(16, 0.9, device=device), RoutingCounts(16)
    thresholds.update(logits[0])
    positions = torch.arange(4096, device=device)
    rate = RoutingRate(Fraction(1, 16), Fraction(1, 2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing_map = select_by_threshold(logits, thresholds.value(), rate, positions, None)
        counts.add(routing_map, logits > thresholds.value(), by_threshold=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = select_by_threshold(
        logits.cpu(), thresholds.value().cpu(), rate, positions.cpu(), None
    )
    assert torch.equal(routing_map.cpu(), expected)
