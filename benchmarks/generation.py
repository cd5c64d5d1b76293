"""Compare generation of this project with transformers: tokens per second with equal weights.

A Llama-like model with random weights is created and converted. It continues prompts of different
lengths greedily, in fp32 on the CPU, with `generate` of `megatron_ext.inference` and with
`generate` of transformers (prompts padded on the left, default cache). Both run in turn in
one process. Times are those of whole calls, including the prompts.

    tokens/s      new tokens of all rows divided by the median time
    ratio         tokens per second of this project over those of transformers: median, minimum and
              maximum over turns
    same tokens   share of rows whose tokens are all equal

    python benchmarks/generation.py [--batch 1 8 32] [--new-tokens 32] [--rounds 5] [--threads 1]
        [--hidden-size 512] [--layers 12] [--prompt 16 128]
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch

from tests.distributed import run_ranks

VOCAB = 16384


def make_model(folder: Path, hidden: int, layers: int) -> Any:
    """Save a random model of transformers, convert it, and return both in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from megatron_ext.inference.loading import load_model
    from tools import convert_checkpoint

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that logits differ clearly
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder / "hf")
    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "megatron")])
    return load_model(folder / "megatron"), reference


def generate_here(trained: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Continue prompts with this project."""
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens=new, greedy=True, stop_at_eod=False)
    return [completion.tokens for completion in generate(trained, prompts, sampling)]


def generate_transformers(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Continue prompts with transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    tokens = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[:, width:].tolist()


def timed(function: Callable[..., list[list[int]]], *args: Any) -> tuple[float, list[list[int]]]:
    """Call a function and return its time in seconds and its result."""
    start = time.perf_counter()
    tokens = function(*args)
    return time.perf_counter() - start, tokens


class GenerationBenchmarkFlags:
    """Values of the command line."""

    batch: list[int]
    new_tokens: int
    prompt: list[int]
    rounds: int
    threads: int
    hidden_size: int
    layers: int


def compare(options: GenerationBenchmarkFlags) -> list[dict[str, Any]]:
    """Measure on a rank and return the rows of the table."""
    torch.set_num_threads(options.threads)
    with (
        tempfile.TemporaryDirectory(prefix="generation-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        trained, reference = make_model(Path(folder), options.hidden_size, options.layers)
    choose = random.Random(1)
    rows = []
    for batch in options.batch:
        prompts = [
            [choose.randrange(VOCAB - 1) for _ in range(choose.randint(*options.prompt))]
            for _ in range(batch)
        ]
        sides = {"us": (generate_here, trained), "them": (generate_transformers, reference)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        tokens = {}
        for turn in range(options.rounds + 1):  # the first warms up
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                function, model = sides[name]
                took, tokens[name] = timed(function, model, prompts, options.new_tokens)
                if turn:
                    seconds[name].append(took)
        same = [a == b for a, b in zip(tokens["us"], tokens["them"])]
        ratios = [theirs / ours for ours, theirs in zip(seconds["us"], seconds["them"])]
        new = batch * options.new_tokens
        rows.append(
            {
                "batch": batch,
                "parameters": sum(p.numel() for p in trained.model.parameters()),
                "threads": options.threads,
                "tokens_per_s": round(new / median(seconds["us"]), 1),
                "transformers_tokens_per_s": round(new / median(seconds["them"]), 1),
                "ratio": round(median(ratios), 3),
                "ratio_least": round(min(ratios), 3),
                "ratio_most": round(max(ratios), 3),
                "same_tokens": sum(same) / len(same),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    heads = ["batch", "tokens/s", "transformers", "ratio", "(least", "most)", "same tokens"]
    print("  ".join(head.rjust(12) for head in heads))
    for row in rows:
        cells = [str(row["batch"]), f"{row['tokens_per_s']:,.1f}"]
        cells += [f"{row['transformers_tokens_per_s']:,.1f}"]
        cells += [f"{row[name]:.3f}" for name in ("ratio", "ratio_least", "ratio_most")]
        cells += [f"{row['same_tokens']:.3f}"]
        print("  ".join(cell.rjust(12) for cell in cells))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--batch", nargs="+", type=int, default=[1, 8, 32], metavar="N",
        help="Numbers of prompts per batch to measure. Default: 1 8 32.")
    add("--new-tokens", type=int, default=32, metavar="N",
        help="Number of new tokens per prompt. Default: %(default)s.")
    add("--prompt", nargs=2, type=int, default=[16, 128], metavar="TOKENS",
        help="Minimum and maximum length of a prompt, in tokens. Default: 16 128.")
    add("--rounds", type=int, default=5, metavar="N",
        help="Number of measured turns of each library. Default: %(default)s.")
    add("--threads", type=int, default=1, metavar="N",
        help="Number of threads of torch. Default: %(default)s.")
    add("--hidden-size", type=int, default=512, metavar="N",
        help="Hidden size of the model. Default: %(default)s.")
    add("--layers", type=int, default=12, metavar="N",
        help="Number of layers of the model. Default: %(default)s.")
    # fmt: on
    flags = parser.parse_args(namespace=GenerationBenchmarkFlags())
    [rows] = run_ranks(compare, 1, flags, timeout=1200)
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps({"benchmark": "generation", **row}))


if __name__ == "__main__":
    main()
