"""Recipe next to a converted checkpoint, with which `pretrain_et.py` continues its training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ext.hf.architecture import Architecture, to_settings

RECIPE = "recipe.yaml"
"""Name of the file in a folder of checkpoints."""

_HERE = "${recipe_dir}"
_LENGTH = 1024
"""Largest sequence length of the recipe, in tokens; a long context is seldom trained in full."""

_HEAD = """\
# Continues the training of {model}, with a new optimizer, from step 0:
#
#     pretrain_et.py --recipe THIS_FILE --train-data-path PREFIX --run-dir RUN
#
# The same command resumes RUN. Flags on the command line override this file, and the folder of this
# file can be moved. Fine-tune the model with et-align train-sft --model FOLDER.
"""
_TRAINING: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": 1000,
    "lr": 2e-5,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.02,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "use_distributed_optimizer": True,
    "log_interval": 10,
    "num_workers": 0,
    "exit_signal_handler": True,
}


def write_recipe(
    folder: Path,
    model: Architecture,
    dtype: torch.dtype,
    tokenizer: Sequence[str],
    place: str,
    has_thresholds: bool,
) -> None:
    """Write `recipe.yaml` into a folder of checkpoints.

    Args:
        folder: Folder of checkpoints, with the tokenizer in it.
        model: Architecture of the model.
        dtype: Data type of the weights.
        tokenizer: Flags of the tokenizer.
        place: File or folder from which the model was converted.
        has_thresholds: Whether the thresholds of the model have values.
    """
    settings = to_settings(model) | {"seq_length": min(model.max_length, _LENGTH)}
    settings["padded_vocab_size"] = model.vocab
    if model.router is not None:
        settings["moe_token_dispatcher_type"] = "alltoall"
    if dtype != torch.float32:
        settings["bf16"] = True  # gradients in fp16 overflow
    text = _HEAD.format(model=f"{place} ({describe(model)})")
    text += _section("The checkpoint that training starts from, and its tokenizer.")
    text += _yaml({"pretrained_checkpoint": _HERE} | _tokenizer(tokenizer))
    text += _section("The model. Other values than these do not fit the weights, except for")
    text += "# seq_length, which may be anything up to max_position_embeddings.\n"
    text += _yaml(settings)
    if model.thresholds and has_thresholds:
        text += _section("The thresholds of the checkpoint route from the first step on.")
        text += _yaml({"et_warmup_iters": 0})
    elif model.thresholds:
        text += _section("The thresholds have no value yet: the first steps route by expert choice")
        text += "# and give them one.\n" + _yaml({"et_warmup_iters": 100})
    text += _section("The training, which can be changed freely.")
    text += _yaml(_TRAINING)
    text += _section("With --valid-data-path, set this to the validation batches of an evaluation.")
    text += _yaml({"eval_iters": 0, "eval_interval": 100})
    (folder / RECIPE).write_text(text, encoding="utf-8")


def how_to_continue(folder: Path) -> str:
    """Return the command that continues the training of a model from its recipe.

    If the model has no tokenizer, a sentence says so.
    """
    command = (
        f"continue its training with: pretrain_et.py --recipe {folder / RECIPE} "
        "--train-data-path PREFIX --run-dir RUN"
    )
    if any((folder / name).exists() for name in ("tokenizer", "tokenizer.model")):
        return command
    return (
        f"{command}\nwarning: the source has no tokenizer, so that the model reads token ids only. "
        "To train it on text, copy tokenizer.json and tokenizer_config.json of the model next to "
        "its config.json, and convert it again."
    )


def describe(model: Architecture) -> str:
    """Return the size of a model in a few words, such as "30 layers of 576, 49,152 tokens"."""
    experts = f", {model.experts} experts" if model.router is not None else ""
    return f"{model.layers} layers of {model.hidden}{experts}, {model.vocab:,} tokens"


def _tokenizer(flags: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a tokenizer, its path relative to the recipe."""
    settings: dict[str, Any] = {}
    for option, value in zip(flags[::2], flags[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        settings[name] = int(value) if name == "vocab_size" else value
        if name == "tokenizer_model":
            settings[name] = f"{_HERE}/{Path(value).name}"
    return settings


def _section(comment: str) -> str:
    return f"\n# {comment}\n"


def _yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False)
