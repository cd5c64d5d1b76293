"""A small trained model for tests that load one; it is trained once per session."""

import json
import random
from functools import cache
from pathlib import Path

import pytest

from tests import pretraining
from tests.megatron import DELTA_NET, MAMBA
from tools import train_tokenizer

MAX_LENGTH = 64
_SYLLABLES = ["ba", "ké", "lo", "mü", "ni", "ra", "su", "té", "vo", "zi"]
MODEL = [
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm"),
    *("--seq-length", str(MAX_LENGTH), "--max-position-embeddings", str(MAX_LENGTH)),
    *("--num-experts", "8", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "64"),
    *("--moe-shared-expert-intermediate-size", "64", "--moe-layer-freq", "[0,1,0,1]"),
    *("--ffn-hidden-size", "128", "--squared-relu", "--disable-bias-linear"),
    *("--no-bias-gelu-fusion", "--untie-embeddings-and-output-weights"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
]
HYBRID = ("--hybrid-layer-pattern", "G-GE*-GE", *DELTA_NET, "--et-norm-scale")
MAMBA_HYBRID = ("--hybrid-layer-pattern", "M-ME*-GE", *DELTA_NET, *MAMBA)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory with its checkpoint, and the tokenizer's file next to it."""
    return train(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def hybrid_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a model with Gated DeltaNet layers; see `run_dir`."""
    folder = tmp_path_factory.getbasetemp() / "hybrid"
    folder.mkdir(exist_ok=True)
    return train(folder, *HYBRID)


@pytest.fixture(scope="session")
def mamba_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a model with Mamba layers; see `run_dir`."""
    folder = tmp_path_factory.getbasetemp() / "mamba"
    folder.mkdir(exist_ok=True)
    return train(folder, *MAMBA_HYBRID)


@cache
def train(folder: Path, *flags: str) -> Path:
    """Train two dense and two ET layers for a few steps on Megatron's mock data.

    Mock documents count upwards through the vocabulary, so a model soon continues them.
    """
    run, tokenizer = folder / "run", folder / "tokenizer.model"
    choose = random.Random(1)
    words = ["".join(choose.choices(_SYLLABLES, k=1 + i % 3)) for i in range(200)]
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"text": " ".join(choose.choices(words, k=60))}) for _ in range(200)]
    corpus.write_text("\n".join(lines))
    train_tokenizer.main(
        ["--input", str(corpus), "--vocab-size", "500", "--output", str(tokenizer)]
    )
    pretraining.train(
        [
            *("--run-dir", run, "--mock-data", "--split", "90,5,5"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
            *MODEL,
            *flags,
            *("--micro-batch-size", "8", "--global-batch-size", "8", "--train-iters", "40"),
            *("--lr", "1e-2", "--min-lr", "1e-2", "--lr-decay-style", "constant"),
            *("--et-warmup-iters", "10", "--et-ema-decay", "0.9"),
            *("--eval-iters", "1", "--eval-interval", "40", "--log-interval", "20"),
        ],
        ranks=1,
    )
    return run
