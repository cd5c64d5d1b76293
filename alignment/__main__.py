"""`et-align NAME ...`, or `python -m alignment NAME ...`: the tools of alignment."""

import importlib
import sys
from collections.abc import Sequence

from megatron_ext.errors import UserError, run_tool_or_ranks

# Name: a module with `main(argv)`, and what it is for. Modules are imported when they are asked
# for, so that help does not wait for torch.
COMMANDS = {
    "data": (
        "alignment.commands.data",
        "import, split and count prompts, responses and preferences",
    ),
    "annotate": (
        "alignment.commands.annotate",
        "verdicts of a judge, or responses of a policy",
    ),
    "train-judge": (
        "alignment.commands.train_judge",
        "a judge that says what a gold judge says (torchrun)",
    ),
    "judge": ("alignment.commands.judge", "verdicts of a judge whose model is at hand (torchrun)"),
    "generate": ("alignment.commands.generate", "responses of a model at hand (torchrun)"),
    "train-sft": ("alignment.commands.train_sft", "a model that answers, on responses (torchrun)"),
    "train-policy": (
        "alignment.commands.train_policy",
        "a policy by judges, graded by gold (torchrun)",
    ),
    "monitor": ("alignment.commands.monitor", "what games a judge in responses"),
    "promote": ("alignment.commands.promote", "a retrained judge past a regression gate"),
    "agreement": ("alignment.commands.agreement", "how far two judges agree"),
    "evaluate": ("alignment.commands.evaluate", "policies compared by judges"),
    "report": ("alignment.commands.report", "what a study of policies and judges found"),
}

# These hold models on their ranks: before Megatron is imported, the device must be chosen.
ON_RANKS = {"train-judge", "judge", "generate", "train-sft", "train-policy"}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the tool that the first word names, with the others."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: et-align NAME ... (et-align NAME --help tells more), where NAME is one of")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:14}{purpose}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"there is no tool {words[0]!r}: known are {', '.join(COMMANDS)}")
    module, _ = COMMANDS[words[0]]
    if words[0] not in ON_RANKS:
        return importlib.import_module(module).main(words[1:])
    from megatron_ext.devices import activate  # imports torch, for which help does not wait
    from megatron_ext.quiet import quiet_megatron

    with quiet_megatron():
        activate(use_cuda=not any(word.startswith("--dry-run") for word in words))
        tool = importlib.import_module(module)
    return tool.main(words[1:])


def entry() -> None:
    sys.argv[0] = "et-align"
    run_tool_or_ranks(main)


if __name__ == "__main__":
    entry()
