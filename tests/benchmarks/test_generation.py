"""Tests of the generation benchmark at a small size."""

from benchmarks.generation import GenerationBenchmarkFlags, compare
from tests.distributed import run_ranks


def test_generation_benchmark_compares_equal_tokens():
    options = GenerationBenchmarkFlags()
    options.batch, options.new_tokens, options.prompt = [3], 4, [2, 9]
    options.rounds, options.threads, options.hidden_size, options.layers = 1, 1, 128, 2
    [[row]] = run_ranks(compare, 1, options)
    assert row["batch"] == 3 and row["same_tokens"] == 1
    assert row["parameters"] == 16384 * 128 + 128 + 2 * (
        128 * (2 * 128 + 2 * 64 + 3 * 384) + 2 * 128
    )
    assert row["tokens_per_s"] > 0 and row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
