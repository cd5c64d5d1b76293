"""Make a folder of a trained model that is ready for a model hub, without using the network.

    python -m tools.publish RUN_DIR --out DIR --data TEXT.jsonl

The folder has the weights in safetensors files, the tokenizer, the configurations of the model and
of generation, the model's code, and a model card. The fan-out of an Expert Threshold model is
measured on a text, and the largest value becomes the cap `max_fan_out` of servers. The logits of
the folder, loaded in transformers, are compared with those of the original.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.inference.loading_flags import check_at_least_one
from megatron_ext.model_location import ModelLocation, announced, locate_model
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import Progress, write_with_progress
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from megatron_ext.hf.model_card import CardFacts, FanOut
    from megatron_ext.hf.sources import Source
    from megatron_ext.inference.loading import TrainedModel

CARD = "README.md"
_LENGTH = 2048
"""Largest number of tokens of a sequence on which the fan-out is measured."""


class PublishFlags:
    """Values of the command line."""

    model: str
    out: str
    data: list[str] | None
    tokens: int
    core: str | None
    name: str | None
    license: str | None
    dataset: list[str]
    tokenizer_model: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, PublishFlags())
    check_at_least_one(tokens=flags.tokens)
    out = Path(flags.out)
    check_new(out, "--out")
    location = locate_model(flags.model, "MODEL")
    announced(location)
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        facts = _facts(flags, location)
        trained = _load(flags, location)
    from megatron_ext.hf.verify import compare_logits, logits_of, verification_tokens

    text = verification_tokens(trained)
    logits = logits_of(trained, text)
    if facts.source.model.thresholds:
        fan_out = measure_fan_out(trained, _text(flags, facts.source), flags.tokens)
        facts = replace(facts, fan_out=fan_out, max_fan_out=fan_out.largest)
    del trained
    with new_folder(out) as folder:
        _write(facts, folder)
        with quiet_megatron():
            difference = compare_logits(logits, folder, text, str(location.folder))
    print(f"wrote {out}: its logits differ by {difference:.3g} of the largest logit")
    if facts.fan_out is not None:
        print(f"max_fan_out: {facts.max_fan_out} of {facts.source.model.experts} experts")
    print(f"read {out / CARD}, then upload the folder with: hf upload NAME {out}")


def _facts(flags: PublishFlags, location: ModelLocation) -> "CardFacts":
    """Open the model and collect what its card states, except for its fan-out.

    Raises:
        UserError: The model cannot be published.
    """
    from megatron_ext.hf.model_card import CardFacts, check_calibrated, read_core
    from megatron_ext.hf.sources import open_hf, open_megatron

    if location.kind == "hf":
        source = open_hf(location.folder)
    else:
        source = open_megatron(location.folder, flags.tokenizer_model)
    check_calibrated(source)
    run = location.folder
    if location.kind == "megatron":
        run = run.parent.parent if run.parent.name == "checkpoints" else run.parent
    core = Path(flags.core) if flags.core else run / "core" / "core.json"
    return CardFacts(
        name=flags.name or run.resolve().name,
        source=source,
        step=location.step,
        metrics=location.metrics,
        core=read_core(core, source) if flags.core or core.is_file() else None,
        license=flags.license,
        datasets=flags.dataset,
    )


def _load(flags: PublishFlags, location: ModelLocation) -> "TrainedModel":
    """Load the model in fp32.

    Raises:
        UserError: It cannot be loaded, or has no tokenizer for texts.
    """
    import torch

    from megatron_ext.inference.loading import load_model

    trained = load_model(
        location.folder, dtype=torch.float32, tokenizer_model=flags.tokenizer_model
    )
    if trained.args.tokenizer_type == "NullTokenizer":
        raise UserError(
            f"{location.folder} has no tokenizer for texts, so that nobody could use the published "
            "model. Train the model with a tokenizer."
        )
    return trained


def _text(flags: PublishFlags, source: "Source") -> list[str]:
    """Return the text on which the fan-out is measured: --data, or the run's validation data.

    Raises:
        UserError: There is none.
    """
    if flags.data:
        return flags.data
    validation = getattr(source.args, "valid_data_path", None) or []
    if len(validation) == 1 and Path(validation[0] + ".idx").is_file():
        return list(validation)
    raise UserError(
        f"--data is missing, and {source.place} has no validation data to measure the fan-out on. "
        "Give text files or the prefix of an indexed dataset with --data."
    )


def measure_fan_out(trained: "TrainedModel", text: list[str], tokens: int) -> "FanOut":
    """Route a text as evaluation does and count the experts of each token.

    Args:
        trained: Model with thresholds.
        text: Prefix of an indexed dataset, or text files.
        tokens: Maximum number of tokens.

    Raises:
        UserError: The text does not exist or is shorter than one sequence.
    """
    from megatron_ext.data.token_stream import sequences_of
    from megatron_ext.hf.model_card import FanOut
    from megatron_ext.inference.text_routing import route_text

    length = min(trained.max_length, _LENGTH, tokens)
    sequences = sequences_of(text, trained, length, tokens)
    counts, loss, layers = np.zeros(()), 0.0, []
    with Progress("routing", sequences.numel(), "tokens") as progress:
        for number, sequence in enumerate(sequences, 1):
            routing = route_text(trained, sequence.tolist())
            layers, (_, _, experts) = routing.layers, routing.maps.shape
            counts = counts + np.stack(
                [np.bincount(row, minlength=experts + 1) for row in routing.fan_out.numpy()]
            )
            loss += float(routing.losses[1:].double().sum())
            progress.update(number * length)
    names = [Path(path).name for path in text]
    mean = loss / (len(sequences) * max(length - 1, 1))
    return FanOut(counts.astype(np.int64), layers, mean, names)


def _write(facts: "CardFacts", folder: Path) -> None:
    """Write everything into an existing folder."""
    from megatron_ext.hf.convert import as_hf
    from megatron_ext.hf.model_card import model_card

    with quiet_megatron():
        conversion = as_hf(facts.source, folder)
    write_with_progress("writing", conversion.bytes, conversion.write)
    if facts.max_fan_out is not None:
        file = folder / "config.json"
        entries: dict[str, Any] = json.loads(file.read_text())
        entries["max_fan_out"] = facts.max_fan_out
        file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    (folder / CARD).write_text(model_card(facts), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.publish", description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL",
        help="Run directory, folder of checkpoints or Hugging Face folder to publish.")
    add("--out", required=True, metavar="DIR",
        help="Folder to create. It must not exist or must be empty.")
    add("--data", nargs="+", metavar="PATH",
        help="Text on which the fan-out is measured: prefix of an indexed dataset, or text files "
             "(.jsonl, .parquet, .txt). Default: the validation dataset of the run.")
    add("--tokens", type=int, default=65536, metavar="N",
        help="Number of tokens of the text to read at most. Default: %(default)s.")
    add("--core", metavar="FILE",
        help="File core.json of tools.eval_core for the model card. Default: core/core.json in "
             "the run directory, if it exists.")
    add("--name", help="Name of the model on its card. Default: the name of the run directory.")
    add("--license", metavar="ID",
        help="License of the model as the hub writes it, such as apache-2.0. Default: none.")
    add("--dataset", action="append", default=[], metavar="ID",
        help="Dataset on the hub that the model was trained on. Can be repeated. Default: none.")
    add("--tokenizer-model", metavar="FILE",
        help="Tokenizer of the checkpoint. Default: the file or folder that training used.")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
