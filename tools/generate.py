"""Continue prompts with a trained model.

    python -m tools.generate --load RUN_DIR --prompt "Once upon a time"

Prints each prompt with its continuation, as it comes when there is one and stdout is a terminal;
with --json one object a line. A model that needs several ranks runs the same way under torchrun:

    torchrun --nproc-per-node 2 -m tools.generate --tensor-model-parallel-size 2 ...
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from megatron_ext.checkpoint import find_model
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    add_model_flags,
    check_at_least_one,
    is_first_rank,
    loading_options,
)
from megatron_ext.inference.sampling import Sampling
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from megatron_ext.inference.generation import Completion
    from megatron_ext.inference.loading import TrainedModel


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    texts = _prompts(options)
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        stop=tuple(options.stop),
    )
    checkpoint = find_model(options.load)
    out = sys.stdout if is_first_rank() else open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.inference.loading import load_model

        layout, others = loading_options(options)
        trained = load_model(checkpoint, layout, **others)
        prompts = [(text, _tokenize(trained, text)) for text in texts]
        jobs = [(*p, options.seed + i) for p in prompts for i in range(options.num_samples)]
        if len(jobs) == 1 and out.isatty() and not options.json:
            _print_as_it_comes(trained, jobs[0], sampling, options.logprobs, out)
        else:
            _print_in_batches(trained, jobs, sampling, options, out)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.generate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Run directory or Hugging Face folder.")
    add("--prompt", action="append", default=[], help="text to continue; may be repeated")
    add("--prompt-file", metavar="FILE", help="UTF-8 file of more prompts, one a line.")
    add("--max-new-tokens", type=int, default=64, help="length of a continuation (%(default)s)")
    add("--temperature", type=float, default=0.8, help="divides the logits (%(default)s)")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens (all)")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest of this mass (1.0)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--seed", type=int, default=0, help="sample i of a prompt is drawn from seed + i")
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    add("--stop", action="append", default=[], metavar="STR", help="end before this string")
    add("--logprobs", action="store_true", help="also the log-probability of each token, in nats")
    add("--json", action="store_true", help="one JSON object a continuation and line")
    add("--batch-size", type=int, default=16, help="continuations at a time (%(default)s)")
    add_model_flags(parser)
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    check_at_least_one(options, "num_samples", "batch_size")
    texts = list(options.prompt)
    if options.prompt_file is not None:
        try:
            with open(options.prompt_file, encoding="utf-8-sig", newline="") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {options.prompt_file}: {error}") from error
        # Unlike `splitlines`, which also ends a line at U+2028, a form feed and others.
        lines = text.removesuffix("\n").split("\n") if text else []
        texts += [line.removesuffix("\r") for line in lines]
    if not texts:
        raise UserError("nothing to continue: give --prompt or --prompt-file")
    if not all(texts):
        raise UserError("a prompt is empty: every --prompt and line of --prompt-file needs text")
    return texts


def _tokenize(trained: "TrainedModel", text: str) -> list[int]:
    try:
        return trained.tokenizer.tokenize(text)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the model's {trained.args.tokenizer_type} cannot read the prompt {text!r}: {error}"
        ) from error


def _print_as_it_comes(
    trained: "TrainedModel",
    job: tuple[str, list[int], int],
    sampling: Sampling,
    log_probs: bool,
    out: TextIO,
) -> None:
    from megatron_ext.inference.generation import stream

    text, prompt, seed = job
    print(text, end="", file=out, flush=True)
    generation = stream(trained, [prompt], sampling, [seed])
    while True:
        try:
            print(next(generation).text, end="", file=out, flush=True)
        except StopIteration as end:
            print(file=out)
            if log_probs:
                _print_log_probs(trained, end.value[0], out)
            return


def _print_in_batches(
    trained: "TrainedModel",
    jobs: list[tuple[str, list[int], int]],
    sampling: Sampling,
    options: argparse.Namespace,
    out: TextIO,
) -> None:
    from megatron_ext.inference.generation import generate

    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        completions = generate(
            trained, [prompt for _, prompt, _ in batch], sampling, [seed for _, _, seed in batch]
        )
        for number, ((text, _, seed), completion) in enumerate(
            zip(batch, completions, strict=True), start + 1
        ):
            if options.json:
                print(_json(text, seed, completion, options.logprobs), file=out, flush=True)
                continue
            if len(jobs) > 1:
                print(f"--- {number}/{len(jobs)}, seed {seed}", file=out)
            print(text + completion.text, file=out, flush=True)
            if options.logprobs:
                _print_log_probs(trained, completion, out)


def _json(text: str, seed: int, completion: "Completion", log_probs: bool) -> str:
    row: dict[str, Any] = {"prompt": text, "seed": seed, "text": completion.text}
    row |= {"finish": completion.finish, "tokens": completion.tokens}
    if log_probs:
        row["log_probs"] = completion.log_probs
    return json.dumps(row, ensure_ascii=False)


def _print_log_probs(trained: "TrainedModel", completion: "Completion", out: TextIO) -> None:
    for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
        print(f"{log_prob:9.4f}  {trained.tokenizer.detokenize([token])!r}", file=out)


if __name__ == "__main__":
    run_tool_or_ranks(main)
