"""The generation benchmark, small: both sides continue prompts alike and are timed."""

import argparse

from benchmarks.generation import compare
from tests.distributed import run_ranks


def test_both_sides_generate_the_same_tokens():
    options = argparse.Namespace(
        batch=[3], new_tokens=4, prompt=[2, 9], rounds=1, threads=1, hidden_size=128, layers=2
    )
    [[row]] = run_ranks(compare, 1, options)
    assert row["batch"] == 3 and row["same_tokens"] == 1
    assert row["parameters"] == 16384 * 128 + 128 + 2 * (
        128 * (2 * 128 + 2 * 64 + 3 * 384) + 2 * 128
    )
    assert row["tokens_per_s"] > 0 and row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
