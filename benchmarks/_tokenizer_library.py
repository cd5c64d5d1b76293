"""Speed of a tokenizer's library alone, for `benchmarks/preprocessing.py`."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def library_seconds(kind: str, model: Path, text: Path, threads: int) -> float:
    """Return the seconds in which the tokenizer's library alone encodes the texts in memory.

    It must run in a new process, because Rust reads the number of threads only once.
    """
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    texts = [json.loads(line)["text"] for line in text.open()]
    encode: Any
    if kind == "huggingface":
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch_fast
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(model))

        def encode(batch: list[str]) -> Any:
            return processor.encode(batch, num_threads=threads)

    begin = time.perf_counter()
    for start in range(0, len(texts), 1000):
        encode(texts[start : start + 1000])
    return time.perf_counter() - begin


def library_alone(kind: str, model: Path, text: Path, threads: int) -> float:
    """Return `library_seconds` of a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(library_seconds, kind, model, text, threads).result()
