"""Console script `et NAME ...`: every command of the project, from any directory.

`et NAME` is `python -m tools.NAME`, `et pretrain` is `pretrain_et.py`, and `et align NAME` is
`et-align NAME`. On several ranks, start it as `torchrun --no-python et NAME ...`: unlike
`torchrun -m`, this finds the installed packages even if the working directory has a package
called `tools` or `alignment`.
"""

import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from megatron_ext import __version__, errors
from megatron_ext.errors import UserError, run_tool_or_ranks

COMMANDS = {
    "pretrain": "Pretrain a model; starts pretrain_et.py.",
    "align": "Align a model with judges; lists the commands of et-align.",
    "preflight": "Check a run before it starts: flags, memory, data, folders and network.",
    "train-tokenizer": "Train a lossless tokenizer, SentencePiece or Hugging Face.",
    "preprocess-data": "Tokenize text into indexed datasets for training and validation.",
    "report": "Draw the report of a run, or compare several runs.",
    "inspect-routing": "Show to which experts a trained model routes a text.",
    "generate": "Continue prompts with a trained model.",
    "serve": "Serve a trained model over an OpenAI-compatible HTTP API.",
    "convert-checkpoint": "Convert a checkpoint to and from the Hugging Face format.",
    "publish": "Make a folder of a trained model that is ready for a model hub.",
    "upcycle": "Convert a dense model into an Expert Threshold model.",
    "calibrate-thresholds": "Set the thresholds at which each expert takes its share of a text.",
    "validation-loss": "Measure the loss of a checkpoint under one routing or several.",
    "eval-core": "Evaluate a model on the CORE benchmark.",
    "eval-harness": "Evaluate a model with EleutherAI's lm-evaluation-harness.",
    "ngram-baseline": "Measure unigram and bigram losses of a dataset in nats per token.",
}
"""Purpose of each command. The code of NAME is in the module of this package with its name."""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first word names, with the remaining words.

    Raises:
        UserError: The command is unknown.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: et NAME ... (et NAME --help shows its flags). Commands:")
        for name, purpose in COMMANDS.items():
            print(f"  {name:22}{purpose}")
        return 0
    if words[0] == "--version":
        print(f"megatron-et {__version__}")
        return 0
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        raise UserError(f"{words[0]} is not a command of et. {advice}")
    errors.typed_command = f"et {name}"
    if name == "align":
        from alignment.__main__ import main as align

        return align(words[1:])
    module = "pretrain_et" if name == "pretrain" else f"{__package__}.{name.replace('-', '_')}"
    sys.argv[1:] = words[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def entry() -> None:
    """Run the console script."""
    sys.argv[0] = "et"
    run_tool_or_ranks(main)


if __name__ == "__main__":
    entry()
