r"""Fine-tune a model on responses to prompts.

    torchrun --nproc-per-node 8 -m alignment train-sft --model DIR --run-dir DIR \
        --input RESPONSES.jsonl --validation-input RESPONSES.jsonl

The loss is taken on the responses alone, not on the prompts. The model of the lowest validation
loss is RUN/best, a Hugging Face folder, from which `train-policy` can start. Repeat the command to
resume a run that was stopped or killed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.commands.config_groups import TrainingConfig
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import group, must_match, parse_config


@dataclass(frozen=True, kw_only=True)
class TrainSFTConfig(TrainingConfig):
    """Flags of `et-align train-sft`."""

    input: tuple[str, ...] = must_match((), metavar="FILE")
    """Responses to train on; required for training."""
    data_transform: str | None = must_match(None, metavar="PATH")
    """Function path, FILE.py:NAME or MODULE:NAME, of a function that changes each response of
    --input and --validation-input, or returns None to leave it out. Default: none."""
    validation_input: tuple[str, ...] = must_match((), metavar="FILE")
    """Responses for validation. Default: none; the last model is exported."""
    epochs: float = must_match(2.0, metavar="N", above=0)
    """Number of passes over the responses."""
    rows: RowsConfig = group()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run.dry_run is None and not self.input:
            raise UserError("train-sft requires --input with responses to train on.")


def parse(argv: Sequence[str]) -> TrainSFTConfig:
    """Return the configuration that a command line describes."""
    # Recipes of model sizes are shared with commands that generate.
    unused = ("generation_batch_size",)
    return parse_config(TrainSFTConfig, argv, "et-align train-sft", __doc__, unused)
