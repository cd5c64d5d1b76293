"""Generate continuations of prompts with a trained model.

    python -m tools.generate --load RUN_DIR --prompt "Once upon a time"

The tool prints each prompt with its continuation. A single continuation is printed token by token
if stdout is a terminal. With --json it prints one object per line. A model that needs several ranks
runs under torchrun with the same flags:

    torchrun --nproc-per-node 2 -m tools.generate --tensor-model-parallel-size 2 ...
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.model_location import announce_model
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from megatron_ext.inference.generation import Completion
    from megatron_ext.inference.loading import TrainedModel
    from megatron_ext.inference.sampling import Sampling


class GenerateFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    prompt: list[str]
    prompt_file: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    seed: int
    num_samples: int
    stop: list[str]
    logprobs: bool
    json: bool
    batch_size: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, GenerateFlags())
    check_at_least_one(num_samples=flags.num_samples, batch_size=flags.batch_size)
    if not -(2**63) <= flags.seed <= 2**64 - flags.num_samples:
        raise UserError(f"--seed {flags.seed} does not fit in 64 bits. Choose a smaller number.")
    texts = read_prompts(flags.prompt, flags.prompt_file)
    from megatron_ext.inference.sampling import Sampling  # imports torch

    sampling = Sampling(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        greedy=flags.greedy,
        stop=tuple(flags.stop),
    )
    checkpoint = announce_model(flags.load)
    out = sys.stdout if is_first_rank() else open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.inference.loading import load_model

        layout, others = flags.load_model_options()
        trained = load_model(checkpoint, layout, **others)
        prompts = [(text, _tokenize(trained, text)) for text in texts]
        jobs = [(*p, flags.seed + i) for p in prompts for i in range(flags.num_samples)]
        if len(jobs) == 1 and out.isatty() and not flags.json:
            _print_as_it_comes(trained, jobs[0], sampling, flags.logprobs, out)
        else:
            _print_in_batches(trained, jobs, sampling, flags, out)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.generate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Run directory or Hugging Face folder.")
    # fmt: off
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="Text to continue. Repeat the flag for several prompts.")
    add("--prompt-file", metavar="FILE", help="UTF-8 file with further prompts, one per line.")
    add("--max-new-tokens", type=int, default=64, metavar="N",
        help="Maximum length of a continuation, in tokens. Default: %(default)s.")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="Divisor of the logits before sampling. Default: %(default)s.")
    add("--top-k", type=int, default=0, metavar="K",
        help="Sample among the K most likely tokens only; 0 for no limit. Default: %(default)s.")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="Sample among the most likely tokens that together have this probability. "
             "Default: %(default)s.")
    add("--greedy", action="store_true",
        help="Always choose the most likely token. --temperature, --top-k and --top-p are ignored.")
    add("--seed", type=int, default=0, metavar="N",
        help="Seed of the first continuation of a prompt; continuation i uses N + i. "
             "Default: %(default)s.")
    add("--num-samples", type=int, default=1, metavar="N",
        help="Number of continuations of each prompt. Default: %(default)s.")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="End a continuation before this text. Repeat the flag for several texts.")
    add("--logprobs", action="store_true",
        help="Also print the log-probability of each token, in nats.")
    add("--json", action="store_true", help="Print one JSON object per continuation.")
    add("--batch-size", type=int, default=16, metavar="N",
        help="Number of continuations that are generated together. Default: %(default)s.")
    # fmt: on
    add_loading_flags(parser)
    return parser


def read_prompts(prompts: Sequence[str], prompt_file: str | None) -> list[str]:
    """Return the prompts of the command line and of a file.

    Args:
        prompts: Values of --prompt.
        prompt_file: Value of --prompt-file.

    Raises:
        UserError: There is no prompt, one is empty, or the file cannot be read.
    """
    texts = list(prompts)
    if prompt_file is not None:
        try:
            with open(prompt_file, encoding="utf-8-sig", newline="") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-file {prompt_file} cannot be read: {error}. Give a UTF-8 text file."
            ) from error
        # `splitlines` would also end a line at U+2028, a form feed and other characters.
        lines = text.removesuffix("\n").split("\n") if text else []
        texts += [line.removesuffix("\r") for line in lines]
    if not texts:
        raise UserError("There is no prompt to continue. Give --prompt or --prompt-file.")
    if not all(texts):
        raise UserError(
            "A prompt is empty. Give text to every --prompt and remove empty lines from "
            "--prompt-file."
        )
    return texts


def _tokenize(trained: "TrainedModel", text: str) -> list[int]:
    from megatron_ext.data.document_tokens import DocumentTokens

    try:
        return DocumentTokens(trained.tokenizer).prompt(text)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The model's {trained.args.tokenizer_type} cannot tokenize the prompt {text!r}: "
            f"{error}. Give a prompt in the vocabulary of the model."
        ) from error


def _print_as_it_comes(
    trained: "TrainedModel",
    job: tuple[str, list[int], int],
    sampling: "Sampling",
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
    sampling: "Sampling",
    flags: GenerateFlags,
    out: TextIO,
) -> None:
    from megatron_ext.inference.generation import generate

    for start in range(0, len(jobs), flags.batch_size):
        batch = jobs[start : start + flags.batch_size]
        completions = generate(
            trained, [prompt for _, prompt, _ in batch], sampling, [seed for _, _, seed in batch]
        )
        for number, ((text, _, seed), completion) in enumerate(
            zip(batch, completions, strict=True), start + 1
        ):
            if flags.json:
                print(_json(text, seed, completion, flags.logprobs), file=out, flush=True)
                continue
            if len(jobs) > 1:
                print(f"--- {number}/{len(jobs)}, seed {seed}", file=out)
            print(text + completion.text, file=out, flush=True)
            if flags.logprobs:
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
