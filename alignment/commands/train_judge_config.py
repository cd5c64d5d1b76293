r"""Train a judge to agree with a gold judge.

    torchrun --nproc-per-node 8 -m alignment train-judge --stage sft --model DIR --run-dir DIR \
        --input ITEMS.jsonl --gold VERDICTS.jsonl \
        --validation-input ITEMS.jsonl --validation-gold VERDICTS.jsonl

Stage sft imitates the labels of the gold judge or, with --thinking, its thinking and labels. Stage
rl samples answers of a judge that thinks, and rewards those close to the gold judge's. The model
that agrees best on the validation items is RUN/best, a Hugging Face folder. Repeat the command to
resume a run that was stopped or killed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.config_groups import (
    JudgeAnswerConfig,
    JudgeFormatConfig,
    ReinforcementTrainingConfig,
)
from alignment.commands.rows_config import RowsConfig
from alignment.judges.formats.scale import check_scale
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import group, must_match, parse_config


@dataclass(frozen=True, kw_only=True)
class TrainJudgeConfig(ReinforcementTrainingConfig):
    """Flags of `et-align train-judge`."""

    stage: Literal["sft", "rl"] = must_match()
    """Stage of the training: supervised fine-tuning or reinforcement learning."""
    input: tuple[str, ...] = must_match((), metavar="FILE")
    """Responses or pairs to learn from; required for training."""
    gold: tuple[str, ...] = must_match((), metavar="FILE")
    """Verdicts of the gold judge, one file for each file of --input; required for training."""
    gold_scale: tuple[float, float] | None = must_match(None, metavar="LOW HIGH")
    """Lowest and highest score of the gold judge, whose scores are mapped to the labels 0 to 9.
    Default: 0 9."""
    validation_input: tuple[str, ...] = must_match((), metavar="FILE")
    """Responses or pairs for validation. Default: none; the last model is exported."""
    validation_gold: tuple[str, ...] = must_match((), metavar="FILE")
    """Verdicts of the gold judge, one file for each file of --validation-input. Default: none."""
    epochs: float = must_match(2.0, metavar="N", above=0)
    """Number of passes over the items in stage sft."""
    max_thinking_tokens: int | None = must_match(None, metavar="TOKENS")
    """Maximum length of an answer of the gold judge that stage sft imitates, in tokens; a lower
    limit trains a judge that thinks less. Default: no limit."""
    steps: int | None = must_match(None, metavar="N", at_least=1)
    """Number of training steps; required in stage rl. Default: in stage sft, as many as --epochs
    takes."""
    temperature: float = must_match(1.0)
    """Sampling temperature of answers in stage rl, above 0."""
    rows: RowsConfig = group()
    format: JudgeFormatConfig = group()
    answers: JudgeAnswerConfig = group()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(
                f"--temperature {self.temperature} must be above 0: equal answers cannot be "
                "compared."
            )
        if len(self.input) != len(self.gold):
            raise UserError(
                f"--input has {len(self.input)} files and --gold has {len(self.gold)}. Give one "
                "file of verdicts for each file of items."
            )
        if len(self.validation_input) != len(self.validation_gold):
            raise UserError(
                f"--validation-input has {len(self.validation_input)} files and --validation-gold "
                f"has {len(self.validation_gold)}. Give one file of verdicts for each file of "
                "items."
            )
        if self.run.dry_run is None and not self.input:
            raise UserError(
                "train-judge requires --input with items to learn from and --gold with verdicts "
                "on them."
            )
        if self.stage == "rl" and self.format.thinking == "none":
            raise UserError("--stage rl requires a judge that thinks. Set --thinking.")
        if self.stage == "rl" and self.steps is None and self.run.dry_run is None:
            raise UserError("--stage rl requires --steps.")
        if self.gold_scale:
            check_scale(self.gold_scale, "--gold-scale")


def parse(argv: Sequence[str]) -> TrainJudgeConfig:
    """Return the configuration that a command line describes."""
    return parse_config(TrainJudgeConfig, argv, "et-align train-judge", __doc__)
