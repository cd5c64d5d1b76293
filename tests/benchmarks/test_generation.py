"""The benchmark of generation at a small size, without vLLM."""

from benchmarks.generation import GenerationBenchmarkFlags, measure
from tests.vllm.servers import make_model


def test_generation_benchmark_compares_equal_texts(tmp_path):
    options = GenerationBenchmarkFlags()
    options.requests, options.new_tokens, options.prompt = [1, 3], 4, [2, 9]
    options.rounds, options.threads, options.vllm_python = 1, 1, None
    make_model(tmp_path / "model", "paper")
    rows = measure("tiny", tmp_path / "model", options)
    assert [(row["requests"], row["engine"]) for row in rows] == [
        (1, "tools.serve"), (1, "transformers"), (3, "tools.serve"), (3, "transformers"),
    ]  # fmt: skip
    assert all(row["same_text"] == 1 and row["tokens_per_s"] > 0 for row in rows)
    assert all(row["first_token_ms"] > 0 and row["next_tokens_ms"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["engine"] == "transformers"] == [1, 1]
