"""Tests of the modeled communication of a tiny model: traffic, gathering, and rows."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.megatron import TINY

EP2 = ("--expert-model-parallel-size", "2", "--use-distributed-optimizer")


def _told_and_traced() -> list[tuple[Any, Any]]:
    """Return the traffic of 4 ranks in both stages, predicted from 16 ranks and traced on 4."""
    from benchmarks.scaling import Batch, extend, group_places, trace

    dist.destroy_process_group()
    flags = [*TINY, *EP2, "--pipeline-model-parallel-size", "2", "--moe-layer-freq", "[1,1]"]
    batch = Batch(micro_batch=2, micro_batches=2)
    far, near = trace(flags, 16, batch), trace(flags, 4, batch)
    places = group_places(flags, 4, batch, ranks_per_node=2)
    return [(extend(f, p, 2, batch), n) for f, p, n in zip(far, places, near)]


@pytest.mark.slow
def test_traffic_is_that_of_a_trace_and_gathers_that_of_the_formula() -> None:
    for modeled, traced in run_ranks(_told_and_traced, 1, timeout=200)[0]:
        for method in ("thresholds", "expert choice"):
            assert modeled[method].keys() == traced[method].keys()
            for key, amount in modeled[method].items():
                assert amount.calls == traced[method][key].calls
                # Buffers are padded to shards of whole ranks.
                padding = 4 * 128 * 16 if key.purpose.startswith(("grad", "param")) else 0
                assert abs(amount.bytes - traced[method][key].bytes) <= amount.calls * padding
        gathers = [
            (key.ranks, amount)
            for key, amount in modeled["gather logits"].items()
            if key.purpose.startswith("routing")
        ]
        # One layer a stage, two micro-batches; 2 ranks with 2 sequences of 32 tokens, 4 experts.
        assert gathers == [(2, (2, 2 * 4 * (2 * 2 * 32) * 4))]


def _main(*argv: str) -> str:
    import sys

    from benchmarks import scaling

    dist.destroy_process_group()
    scaling.MODELS["tiny"] = scaling.Model(tuple(TINY), 2, 8)
    sys.argv = ["scaling.py", "--models", "tiny", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        scaling.main()
    return printed.getvalue()


@pytest.mark.slow
def test_a_table_a_json_object_a_row_and_a_picture(tmp_path: Path) -> None:
    argv = ["--ranks", "2", "4", "16", "--output", str(tmp_path), *EP2]
    printed = run_ranks(_main, 1, *argv, timeout=200)[0]
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    # A batch of 8 sequences does not divide over 16 ranks.
    counts = [("weak", 2), ("weak", 4), ("weak", 16), ("fixed", 2), ("fixed", 4)]
    assert [(row["batch"], row["ranks"]) for row in rows[::3]] == counts
    assert [row["method"] for row in rows[:3]] == ["thresholds", "expert choice", "gather logits"]
    for row in rows:
        assert row["benchmark"] == "scaling"
        tokens = 8 * 32 if row["batch"] == "fixed" else row["ranks"] * 2 * 32
        assert row["tokens"] == tokens
        assert row["total_ms"] == pytest.approx(sum(row["ms"].values()), abs=0.01)
        share = 100 * row["routing_ms"] / row["total_ms"]
        assert row["routing_percent"] == pytest.approx(share, rel=0.05)  # times are rounded
        assert f"{row['routing_ms']:,.2f}" in printed
        if row["method"] == "gather logits":
            assert row["routing_bytes"] == 4 * 4 * tokens  # one layer, four experts
    assert printed.count("batch; a step of a rank") == 2
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
