"""Tests of runs whose dataset was made again in the same place with other text."""

import json
from pathlib import Path

import pytest

from tests.data import hf_tokenizers
from tests.distributed import run_ranks
from tests.pretraining import start
from tests.tools.preprocessed import make_texts, preprocess, write_jsonl
from tests.training.test_hf_tokenizer import SMALL

FLAGS = (
    *SMALL, "--seq-length", "32", "--eval-iters", "0",
    "--override-opt-param-scheduler", "--num-workers", "0",
)  # fmt: skip


def train(prefix: Path, run: Path, steps: int, *more: object) -> tuple[list[float], str]:
    """Return the losses of a run with these flags, and its stderr."""
    data = ["--train-data-path", f"{prefix}_train_text_document", *more]
    flags = [*FLAGS, *data, "--train-iters", steps, "--run-dir", run]
    ((code, errors),) = run_ranks(start, 1, flags, timeout=240)
    assert code == 0, errors
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [row["loss"] for row in rows if "loss" in row], errors


@pytest.mark.slow
@pytest.mark.parametrize("shares_cache", [False, True])
def test_training_reads_the_new_content_of_a_replaced_dataset(
    tmp_path: Path, shares_cache: bool
) -> None:
    folder = hf_tokenizers.byte_level(tmp_path / "tokenizer")
    texts = make_texts(200)
    flags: list[object] = ["--tokenizer-model", folder]
    flags += ["--data-cache-path", tmp_path / "cache"] if shares_cache else []

    def make(prefix: Path, texts: list[str], *more: object) -> Path:
        source = write_jsonl(tmp_path / f"{len(texts)}.jsonl", texts)
        preprocess(folder, [source], prefix, "--valid-fraction", 0, *more)
        return prefix

    data = make(tmp_path / "data", texts[:60])
    before, _ = train(data, tmp_path / "before", 2, *flags)
    make(data, texts, "--overwrite")
    replaced, errors = train(data, tmp_path / "after", 2, *flags)
    assert "have changed" not in errors
    fresh, _ = train(make(tmp_path / "other", texts), tmp_path / "fresh", 2, *flags)
    assert replaced == fresh != before
    # A run that resumes reads the new content too, and says so.
    resumed, errors = train(data, tmp_path / "before", 4, *flags)
    assert "warning: the datasets have changed since" in errors
    assert len(resumed) == 4 and resumed[:2] == before
