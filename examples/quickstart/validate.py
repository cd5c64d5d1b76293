"""Compare the loss of a trained model on every validation token with a unigram and a bigram.

All three predict the same tokens: those of the concatenated validation data except for the first.
The context of the bigram is the preceding token; that of the model are the preceding tokens in
consecutive windows of its sequence length, so that the first token of a window has one token of
context. The model routes by its thresholds.

Writes validation.json into the run directory, and text.txt, the beginning of the validation text.
"""

import argparse
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.data.tokenizer_identity import check_dataset_tokenizer
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, run_tool
from megatron_ext.evaluation.ngram_losses import baseline_losses, read_stream
from megatron_ext.json_numbers import dump_json

if TYPE_CHECKING:
    from megatron_ext.inference.loading import TrainedModel

_WINDOWS = 16  # at a time
_TEXT_TOKENS = 250


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(
        prog="python -m examples.quickstart.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run-dir", required=True, metavar="DIR", help="Folder of a run with a checkpoint."
    )
    parser.add_argument(
        "--train-data",
        required=True,
        metavar="PREFIX",
        help="Dataset in which the baselines count tokens.",
    )
    parser.add_argument("--valid-data", required=True, metavar="PREFIX", help="Dataset to predict.")
    options = parser.parse_args(argv)
    run_dir = Path(options.run_dir)
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),  # Megatron's notices
    ):
        warnings.simplefilter("ignore")
        activate()  # before anything of Megatron is imported
        from megatron_ext.inference.loading import load_model

        trained = load_model(run_dir)
        for prefix in (options.train_data, options.valid_data):
            check_dataset_tokenizer(prefix, trained.args)
        train, valid = read_stream(options.train_data), read_stream(options.valid_data)
        losses = token_losses(trained, torch.from_numpy(valid))
    result = {
        "validation": float(losses.double().mean()),
        **baseline_losses(train, valid, trained.vocab_size),
        "tokens": len(losses),
        "step": trained.iteration,
    }
    text = trained.tokenizer.detokenize(valid[:_TEXT_TOKENS].tolist())
    _write(run_dir / "text.txt", text)
    _write(run_dir / "validation.json", dump_json(result) + "\n")
    print(dump_json(result))


@torch.no_grad()
def token_losses(trained: "TrainedModel", stream: Tensor) -> Tensor:
    """Return the loss of `stream[1:]` in nats, `[tokens - 1]`, in windows of the model's length."""
    from megatron_ext.inference.forward import full_logits

    length = trained.max_length
    whole = (len(stream) - 1) // length * length
    inputs, targets = (part[:whole].view(-1, length) for part in (stream[:-1], stream[1:]))
    batches = list(zip(inputs.split(_WINDOWS), targets.split(_WINDOWS)))
    if whole < len(stream) - 1:  # the last window is shorter
        batches.append((stream[None, whole:-1], stream[None, whole + 1 :]))
    losses = []
    for batch, labels in batches:
        logits = full_logits(trained, batch.to(torch.cuda.current_device()))
        assert logits is not None  # the model is not split into stages
        losses.append(
            F.cross_entropy(logits.flatten(0, 1).float().cpu(), labels.flatten(), reduction="none")
        )
    return torch.cat(losses)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    run_tool(main)
