"""Tests of the routing benchmark with a tiny model: only expert choice changes decisions."""

import argparse

from benchmarks.routing_flips import compare
from tests.distributed import run_ranks


def test_only_routers_that_look_at_the_batch_flip():
    options = argparse.Namespace(
        dtypes=["fp32"], hidden_size=32, layers=2, experts=8, topk=2, responses=8, new_tokens=12,
        seq_length=64, micro_batch_size=2,
    )  # fmt: skip
    [rows] = run_ranks(compare, 1, options)
    flips = {row["router"]: row["flip_rate"] for row in rows}
    assert flips["expert threshold"] == flips["token choice"] == 0
    assert flips["expert choice"] > 0.01
    assert rows[0]["usage"] > 0.5 and rows[-1]["usage"] == 1
