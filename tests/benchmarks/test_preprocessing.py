"""Tests of the preprocessing benchmark at a small size, without Megatron-LM, and of its text."""

import json
from pathlib import Path

import pytest

from benchmarks.preprocessing import KINDS, US, PreprocessingBenchmarkFlags, articles, measure
from tools import train_tokenizer


def test_copies_of_the_articles_hold_as_many_new_words_as_their_end(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    share = articles(text, 12)
    assert text.stat().st_size >= 12e6
    lines = [json.loads(line)["text"].split(" ") for line in text.open()]
    count = len(lines) // 2  # of articles, each of which is there twice
    assert [len(words) for words in lines[:count]] == [len(words) for words in lines[count:]]
    vocabulary = set().union(*lines[:count])
    copied = [word for words in lines[count:] for word in words]
    new = sum(word not in vocabulary for word in copied) / len(copied)
    assert 0.02 < share < 0.2 and abs(new - share) < 0.002


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_measured_alone(tmp_path: Path, kind: str) -> None:
    text = tmp_path / "text.jsonl"
    model = tmp_path / ("folder" if kind == "huggingface" else "tokenizer.model")
    texts = [f"{number} tokens went to expert {number % 7}" for number in range(300)]
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    size = "270" if kind == "huggingface" else "300"
    arguments = ["--input", str(text), "--kind", kind, "--vocab-size", size]
    train_tokenizer.main([*arguments, "--output", str(model)])
    options = PreprocessingBenchmarkFlags()
    options.rounds, options.megatron_tool = 1, None
    row = measure([US], options, kind, text, model, workers=2)
    assert row["megabytes"] == round(sum(map(len, texts)) / 1e6, 3)
    assert row["workers"] == 2 and row["seconds"] > 0 and row["start_seconds"] > 0
    assert row["tokens"] > 300 and row["tokens_per_s"] and row["library_tokens_per_s"]
    assert "ratio" not in row
