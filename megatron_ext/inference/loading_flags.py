"""Flags of the tools that run a trained model: in what layout and precision."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.inference.loading import ParallelLayout


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (fp32 on a CPU)")
    add("--tokenizer-model", metavar="FILE", help="if it is not where it was in training")
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    add("--expert-model-parallel-size", type=int, default=1, metavar="N")


def check_at_least_one(options: argparse.Namespace, *flags: str) -> None:
    """Refuse numbers below 1 for flags given by the names argparse has for them."""
    for flag in flags:
        if (value := getattr(options, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be at least 1")


def loading_options(options: argparse.Namespace) -> tuple["ParallelLayout", dict[str, Any]]:
    """The layout and what else `load_model` takes; call it after `activate`."""
    from megatron_ext.inference.loading import DTYPES, ParallelLayout

    layout = ParallelLayout(
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        expert=options.expert_model_parallel_size,
    )
    dtype = DTYPES[options.dtype] if options.dtype else None
    return layout, {"dtype": dtype, "tokenizer_model": options.tokenizer_model}


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
