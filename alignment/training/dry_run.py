"""What a training needs, from the model's config.json alone."""

import argparse
import os
import shlex
from pathlib import Path

import torch

from alignment.engines.megatron_launch import MegatronLayout
from alignment.training.flags import layout_of
from megatron_ext.arguments import parse_args
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, to_flags
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import read_config
from megatron_ext.training.dry_run import dry_run as pretraining_dry_run


def dry_run(options: argparse.Namespace) -> None:
    """Print parameters, memory of a rank, FLOPs a token and collectives of a step; of a model that
    is to write answers also what their keys and values take.

    The step is a short one, of as many micro-batches as there are pipeline stages: longer ones
    take no more memory.

    Raises:
        UserError: the model is of no known family, or --engine is not megatron.
    """
    if options.engine != "megatron":
        raise UserError("--dry-run is for --engine megatron")
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder} has no config.json, which --dry-run reads")
    model = read_config(load_config(folder))
    layout = layout_of(options)
    copies = max(1, options.dry_run // (layout.tensor * layout.pipeline * layout.context))
    rows = layout.micro_batch * copies * layout.pipeline
    values = {
        "seq-length": options.seq_length,
        "global-batch-size": rows,
        "lr": options.lr,
        "train-iters": 1,
        "vocab-size": model.vocab,
        "transformer-impl": "local",
        "dry-run": options.dry_run,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    precision = [] if options.dtype == "fp32" else ["--bf16"]
    extra = shlex.split(options.megatron_flags)
    args, config = parse_args(
        [*to_flags(model), *precision, *layout.flags, *words, "--mock-data", *extra]
    )
    if getattr(options, "thinking", "none") != "none":
        answers = cache_bytes(model, layout, options.rows, options.seq_length, args.params_dtype)
        print(
            f"while it answers, keys and values of --rows {options.rows} take up to "
            f"{answers / 2**20:,.0f} MiB of a rank, in place of the activations\n"
        )
    pretraining_dry_run(args, config)


def cache_bytes(
    model: Architecture, layout: MegatronLayout, rows: int, length: int, dtype: torch.dtype
) -> int:
    """Bytes of the keys and values of rows of so many tokens, on a rank of the first stage.

    The cache doubles its length when it is full.
    """
    heads = -(-model.kv_heads // layout.tensor)
    layers = -(-model.layers // layout.pipeline)
    longest = 1 << (length - 1).bit_length()
    return 2 * layers * rows * heads * model.head_dim * longest * dtype.itemsize
