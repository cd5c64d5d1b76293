"""Command-line flags of the tools that load a model: layout, precision and tokenizer."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.inference.loading import ParallelLayout


class LoadingFlags:
    """Values of the flags that `add_loading_flags` adds; a tool derives a class with its own flags.

    An instance is the `namespace` of `ArgumentParser.parse_args`, which sets the attributes.
    """

    dtype: str | None
    tokenizer_model: str | None
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    expert_model_parallel_size: int

    def load_model_options(self) -> tuple["ParallelLayout", dict[str, Any]]:
        """Return the layout and the keyword arguments of `load_model`, after `activate`."""
        from megatron_ext.inference.loading import DTYPES, ParallelLayout

        layout = ParallelLayout(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            expert=self.expert_model_parallel_size,
        )
        dtype = DTYPES[self.dtype] if self.dtype else None
        return layout, {"dtype": dtype, "tokenizer_model": self.tokenizer_model}


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `LoadingFlags` to a parser."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="Data type of the weights. Default: that of training, or fp32 on a CPU.",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="Tokenizer file or folder. Default: the one that training used.",
    )
    for name, unit in (("tensor", "layer"), ("pipeline", "model"), ("expert", "set of experts")):
        add(
            f"--{name}-model-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help=f"Number of ranks that share each {unit} ({name} parallelism). Default: 1.",
        )


def check_at_least_one(**values: int | None) -> None:
    """Raise an error if a number is below 1.

    Args:
        **values: Numbers by the names of their flags, with underscores. None passes.

    Raises:
        UserError: A number is below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} is below 1. Set it to 1 or more.")


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"
