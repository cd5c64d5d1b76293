"""Compare generation by tools.serve, vLLM and transformers: the same models, prompts and tokens.

Prompts of random tokens arrive at once and are continued greedily, in fp32 on the CPU. The two
servers answer streamed requests over HTTP. transformers generates the prompts as one batch, padded
on the left, without HTTP. All three have the model loaded and take turns in one run; every engine
computes with `--threads` threads.

    tokens/s       new tokens of all requests divided by the time until the last one, median
    first token    time from the arrival of the requests to a request's first text, in ms, median
    next tokens    time between the tokens of a request, in ms, median
    ratio          tokens per second over those of transformers in the same turn: median, minimum
                   and maximum over turns
    same text      share of requests whose text is that of transformers

Without `--model` two models with random weights and the same number of active parameters per token
are made: `dense` (a Llama) and `experts` (an Expert Threshold model of the same width, with a
shared expert, and 16 routed experts of which a token gets 2 on average).

    python benchmarks/generation.py [--vllm-python .venv-vllm/bin/python] [--model NAME=FOLDER ...]
        [--requests 1 8 32 128] [--new-tokens 32] [--prompt 16 128] [--rounds 3] [--threads 1]

`bash tests/vllm/environment.sh` makes an environment of vLLM for CPUs and prints its Python.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import httpx
import torch
from transformers.utils.logging import disable_progress_bar

from tests.hf.models import add_tokenizer
from tests.vllm.servers import free_port, make_model, save_model, serve, set_thresholds

ROOT = Path(__file__).resolve().parent.parent
VOCAB, HIDDEN, LAYERS, INNER = 16384, 512, 12, 1536
EXPERTS, FAN_OUT = 16, 2


@dataclass
class Turn:
    """Times of all requests of one turn.

    Attributes:
        seconds: Time until the last request was complete, in seconds.
        first: Time to the first text of each request, in seconds.
        gaps: Mean time between two tokens of each request, in seconds.
        texts: Text of each response.
    """

    seconds: float
    first: list[float]
    gaps: list[float]
    texts: list[str]


class Engine(Protocol):
    """Way to continue prompts."""

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """Continue all prompts by `new` tokens each, greedily."""


class HTTPEngine:
    """Server with OpenAI's API."""

    def __init__(self, url: str, model: str) -> None:
        """Make a client.

        Args:
            url: Address, without /v1.
            model: Name of the model.
        """
        self.url, self.model = url, model

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """Continue the prompts by concurrent streamed requests."""
        return asyncio.run(self._all(prompts, new))

    async def _all(self, prompts: list[list[int]], new: int) -> Turn:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=1800, limits=limits) as http:
            begin = time.perf_counter()
            rows = await asyncio.gather(*(self._one(http, prompt, new) for prompt in prompts))
        first = [times[0] - begin for times, _ in rows]
        gaps = [(times[-1] - times[0]) / (new - 1) for times, _ in rows]
        seconds = max(times[-1] for times, _ in rows) - begin
        return Turn(seconds, first, gaps, [text.strip() for _, text in rows])

    async def _one(
        self, http: httpx.AsyncClient, prompt: list[int], new: int
    ) -> tuple[list[float], str]:
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        times, text, tokens = [], "", 0
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.url}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(time.perf_counter())
                    text += event["choices"][0]["text"]
        if tokens != new:
            raise RuntimeError(f"{self.url} returned {tokens} tokens instead of {new}")
        return times, text


class TransformersEngine:
    """`generate` of transformers, in this process."""

    def __init__(self, folder: Path) -> None:
        """Load a model.

        Args:
            folder: Hugging Face folder.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def generate(self, prompts: list[list[int]], new: int) -> Turn:
        """Continue the prompts as one batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        times = []

        def note_time(_: Any, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

        begin = time.perf_counter()
        tokens = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[note_time],
        )
        end = time.perf_counter()
        texts = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        rows = len(prompts)
        gap = (times[-1] - times[0]) / (new - 1)
        return Turn(
            end - begin, [times[0] - begin] * rows, [gap] * rows, [t.strip() for t in texts]
        )


def make_dense(folder: Path) -> None:
    """Write a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        max_position_embeddings=2048,
        initializer_range=0.1,  # large enough that logits differ clearly
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    add_tokenizer(folder, VOCAB)


def make_experts(folder: Path) -> None:
    """Write an Expert Threshold model whose mean fan-out on random tokens is `FAN_OUT`."""
    from megatron_ext.hf.remote.modeling_et import Router

    inner = INNER // (FAN_OUT + 1)
    model = make_model(
        folder,
        "upcycled",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        head_dim=64,
        max_position_embeddings=2048,
        moe_layers=[1] * LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=FAN_OUT,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
    )

    def calibrate(router: Router, inputs: tuple[torch.Tensor, ...]) -> None:
        logits = torch.nn.functional.linear(inputs[0].flatten(0, -2), router.weight)
        levels = torch.quantile(logits, 1 - FAN_OUT / EXPERTS, dim=0)
        set_thresholds(router, levels, model.config)

    # Each router gets its thresholds before it routes, so that the layers behind it see the result.
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(calibrate)
    with torch.no_grad():
        model(torch.randint(VOCAB, (8, 128), generator=torch.Generator().manual_seed(2)))
    save_model(model, folder)


@contextmanager
def serve_here(folder: Path, threads: int, slots: int) -> Iterator[str]:
    """Run tools.serve while the context lasts, and give its address."""
    port = free_port()
    command = [
        sys.executable, "-m", "tools.serve", "--load", str(folder), "--port", str(port),
        "--model-name", "policy", "--max-batch-size", str(slots),
    ]  # fmt: skip
    log = folder / "serve.log"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-3000:])
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


class GenerationBenchmarkFlags:
    """Values of the command line."""

    model: list[str]
    vllm_python: str | None
    requests: list[int]
    new_tokens: int
    prompt: list[int]
    rounds: int
    threads: int


def measure(name: str, folder: Path, options: GenerationBenchmarkFlags) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    slots = max(options.requests)
    with ExitStack() as stack:
        url = stack.enter_context(serve_here(folder, options.threads, slots))
        engines: dict[str, Engine] = {"tools.serve": HTTPEngine(url, "policy")}
        if options.vllm_python:
            os.environ["VLLM_PYTHON"] = options.vllm_python
            length = str(options.prompt[1] + options.new_tokens)
            vllm = serve(
                folder, "--max-num-seqs", str(slots), "--max-model-len", length,
                log=folder / "vllm.log", OMP_NUM_THREADS=str(options.threads),
                PYTHONPATH=os.fspath(ROOT),
            )  # fmt: skip
            engines["vLLM"] = HTTPEngine(stack.enter_context(vllm), "policy")
        reference = TransformersEngine(folder)
        engines["transformers"] = reference
        vocabulary = reference.model.config.vocab_size
        rows = []
        for requests in options.requests:
            choose = random.Random(requests)
            turns: dict[str, list[Turn]] = {engine: [] for engine in engines}
            for turn in range(options.rounds + 1):  # the first one warms up
                # New prompts in each turn, as a server may remember the old ones.
                prompts = [
                    [
                        choose.randrange(2, vocabulary)
                        for _ in range(choose.randint(*options.prompt))
                    ]
                    for _ in range(requests)
                ]
                for engine in list(engines)[:: 1 if turn % 2 else -1]:
                    turns[engine].append(engines[engine].generate(prompts, options.new_tokens))
            rows += [
                summarize(name, engine, turns[engine][1:], turns["transformers"][1:], options)
                for engine in engines
            ]
    return rows


def summarize(
    model: str,
    engine: str,
    turns: list[Turn],
    references: list[Turn],
    options: GenerationBenchmarkFlags,
) -> dict[str, Any]:
    """Return a row of the table."""
    requests = len(turns[0].texts)
    ratios = [other.seconds / turn.seconds for turn, other in zip(turns, references)]
    same = [a == b for turn, o in zip(turns, references) for a, b in zip(turn.texts, o.texts)]
    return {
        "model": model,
        "requests": requests,
        "engine": engine,
        "threads": options.threads,
        "tokens_per_s": round(requests * options.new_tokens / median(t.seconds for t in turns), 1),
        "first_token_ms": round(1e3 * median(x for turn in turns for x in turn.first), 1),
        "next_tokens_ms": round(1e3 * median(x for turn in turns for x in turn.gaps), 2),
        "ratio": round(median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
        "same_text": round(sum(same) / len(same), 3),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    heads = ["model", "requests", "engine", "tokens/s", "first token", "next tokens", "ratio"]
    heads += ["(least", "most)", "same text"]
    print("  ".join(head.rjust(12) for head in heads))
    for row in rows:
        cells = [row["model"], str(row["requests"]), row["engine"], f"{row['tokens_per_s']:,.1f}"]
        cells += [f"{row['first_token_ms']:,.1f}", f"{row['next_tokens_ms']:,.2f}"]
        cells += [f"{row[name]:.3f}" for name in ("ratio", "ratio_least", "ratio_most")]
        cells += [f"{row['same_text']:.3f}"]
        print("  ".join(cell.rjust(12) for cell in cells))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--model", nargs="+", default=[], metavar="NAME=FOLDER",
        help="Hugging Face folders to measure, with a name for the table. Default: two random "
             "models, dense and experts.")
    add("--vllm-python", metavar="FILE",
        help="Python of an environment with vLLM and this project's plug-in. Default: vLLM is "
             "left out.")
    add("--requests", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N",
        help="Numbers of concurrent requests to measure. Default: 1 8 32 128.")
    add("--new-tokens", type=int, default=32, metavar="N",
        help="Number of new tokens per request, at least 2. Default: %(default)s.")
    add("--prompt", nargs=2, type=int, default=[16, 128], metavar="TOKENS",
        help="Minimum and maximum length of a prompt, in tokens. Default: 16 128.")
    add("--rounds", type=int, default=3, metavar="N",
        help="Number of measured turns of each engine. Default: %(default)s.")
    add("--threads", type=int, default=1, metavar="N",
        help="Number of threads of each engine. Default: %(default)s.")
    # fmt: on
    flags = parser.parse_args(namespace=GenerationBenchmarkFlags())
    if flags.new_tokens < 2:
        parser.error("--new-tokens must be at least 2, to time the tokens after the first.")
    torch.set_num_threads(flags.threads)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory(prefix="generation-") as scratch:
        folders = {
            name: Path(folder) for name, _, folder in (m.partition("=") for m in flags.model)
        }
        if not folders:
            folders = {name: Path(scratch) / name for name in ("dense", "experts")}
            make_dense(folders["dense"])
            make_experts(folders["experts"])
        for name, folder in folders.items():
            rows += measure(name, folder, flags)
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps({"benchmark": "generation", **row}))


if __name__ == "__main__":
    main()
