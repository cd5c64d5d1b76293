"""Console script `et-align NAME ...`, or `python -m alignment NAME ...`."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from megatron_ext.errors import UserError, run_tool_or_ranks

COMMANDS = {
    "data": "Import, split and count prompts, responses and preferences.",
    "annotate": "Collect verdicts of a judge, or responses of a policy, from an endpoint.",
    "train-judge": "Train a judge to agree with a gold judge (torchrun).",
    "judge": "Collect verdicts of a judge whose model runs on the ranks (torchrun).",
    "generate": "Generate responses of a model that runs on the ranks (torchrun).",
    "train-sft": "Fine-tune a model on responses (torchrun).",
    "train-policy": "Train a policy on the rewards of judges (torchrun).",
    "monitor": "Detect responses that game a judge.",
    "promote": "Replace a judge by a retrained one that passes a regression test.",
    "agreement": "Measure how well two judges agree.",
    "evaluate": "Compare policies by their scores and preferences from judges.",
    "report": "Write a report on a study of policies and judges.",
}
"""Purpose of each command. Command NAME has its flags in `alignment.commands.NAME_config`, which
does not import torch, and its `run` in `alignment.commands.NAME`."""

# Commands that hold models on their ranks: the device is chosen before Megatron is imported.
ON_RANKS = {"train-judge", "judge", "generate", "train-sft", "train-policy"}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first word names, with the remaining words.

    Raises:
        UserError: The command or one of its flags is unknown.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: et-align NAME ... (et-align NAME --help shows its flags). Commands:")
        for name, purpose in COMMANDS.items():
            print(f"  {name:14}{purpose}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        raise UserError(f"{name} is not a command of et-align. {advice}")
    module = f"alignment.commands.{name.replace('-', '_')}"
    config = importlib.import_module(f"{module}_config").parse(rest)
    if name not in ON_RANKS:
        status: int | None = importlib.import_module(module).run(config)
        return status
    from megatron_ext.console import console
    from megatron_ext.devices import activate  # imports torch
    from megatron_ext.quiet import quiet_megatron

    dry_run = any(word.startswith("--dry-run") for word in rest)
    if name.startswith("train-") and not dry_run:
        console.capture()
    with quiet_megatron():
        activate(use_cuda=not dry_run)
        command = importlib.import_module(module)
    status = command.run(config)
    return status


def entry() -> None:
    """Run the console script."""
    sys.argv[0] = "et-align"
    run_tool_or_ranks(main)


if __name__ == "__main__":
    entry()
