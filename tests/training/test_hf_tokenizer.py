"""Tests of a run with a Hugging Face tokenizer, from text to a converted model, with a move."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.data import hf_tokenizers
from tests.distributed import run_ranks
from tests.megatron import TINY
from tests.pretraining import start
from tests.tools.preprocessed import make_texts, preprocess, write_jsonl

_OTHER = (
    "--tokenizer-type",
    "--vocab-size",
    "--seq-length",
    "--max-position-embeddings",
    "--split",
)
SMALL = [
    word
    for before, word in zip(["", *TINY], TINY)
    if word not in (*_OTHER, "--mock-data") and before not in _OTHER
]


def use(run: Path, prefix: str, out: Path) -> dict[str, object]:
    """Return, on a rank, the results of the tools for a run."""
    from megatron_ext.evaluation.losses import Windows
    from megatron_ext.evaluation.models import MegatronModel
    from megatron_ext.inference.loading import load_model
    from tools import convert_checkpoint

    trained = load_model(run)
    model = MegatronModel(trained)
    windows = Windows(prefix, 32)
    text = "naïve 漢字 <|endoftext|> 2024"
    convert_checkpoint.main(
        ["--from", "megatron", "--to", "hf", "--load", str(run), "--save", str(out), "--verify"]
    )
    return {
        "bytes": windows.text_bytes(model.codec),
        "ids": trained.tokenizer.tokenize(text),
        "of transformers": AutoTokenizer.from_pretrained(out)(text).input_ids,
        "tokenizer": trained.args.tokenizer_model,
        "vocab": (trained.vocab_size, trained.args.padded_vocab_size, trained.max_length),
        "rows": trained.model.embedding.word_embeddings.weight.shape[0],
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_with_a_hugging_face_tokenizer_can_be_moved_resumed_and_converted(
    tmp_path: Path,
) -> None:
    folder = hf_tokenizers.byte_level(tmp_path / "tokenizer")
    # A tokenizer that begins and ends texts itself: its special tokens have no bytes.
    folder = hf_tokenizers.with_begin_and_end(folder, tmp_path / "with begin")
    texts = make_texts(300)
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    preprocess(folder, [source], tmp_path / "data", "--valid-fraction", 0.2)
    train_data, valid_data = (f"{tmp_path}/data_{s}_text_document" for s in ("train", "valid"))
    run, moved = tmp_path / "run", tmp_path / "elsewhere/run"
    data = ["--train-data-path", train_data, "--valid-data-path", valid_data]

    def begin(run_dir: Path, *more: object) -> tuple[int, str]:
        [ended] = run_ranks(start, 1, [*SMALL, *data, "--run-dir", run_dir, *more], timeout=240)
        return ended

    # Neither the type of the tokenizer nor the context length is named.
    flags = ["--tokenizer-model", folder / "tokenizer.json", "--seq-length", "48"]
    code, error = begin(run, *flags)
    assert code == 0 and "using the tokenizer" not in error
    moved.parent.mkdir()
    run.rename(moved)
    shutil.rmtree(folder)
    copy = str(moved / "tokenizer")

    [result] = run_ranks(use, 1, moved, valid_data, tmp_path / "hf", timeout=240)
    assert result["tokenizer"] == copy
    assert result["ids"] == result["of transformers"]
    assert result["vocab"] == (300, 384, 48) and result["rows"] == 384
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["max_position_embeddings"] == 48 and config["eos_token_id"] == 0
    manifest = json.loads((tmp_path / "data.json").read_text())["splits"]["valid"]
    first = AutoTokenizer.from_pretrained(copy).convert_tokens_to_ids("<|pad|>")
    assert np.fromfile(f"{valid_data}.bin", np.uint16)[0] == first
    assert result["bytes"] == manifest["bytes"]

    # The same command resumes from the copy, and so does one that names no tokenizer.
    for more in (flags, flags[2:]):
        steps = ["--train-iters", str(7 + (more != flags)), "--override-opt-param-scheduler"]
        code, error = begin(moved, *more, *steps)
        assert code == 0 and f"using the run's copy of the tokenizer, {copy}, because" in error
    rows = (moved / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert len(losses) == 8 and all(map(math.isfinite, losses))

    # Another tokenizer than that of the training is refused.
    other = hf_tokenizers.byte_level(tmp_path / "other", 290)
    code, error = begin(moved, "--tokenizer-model", other, "--seq-length", "48", "--train-iters", 9)
    assert code == 2 and "was made with another tokenizer" in error
