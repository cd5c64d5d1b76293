"""Judge responses or pairs with a model that runs on the ranks of this command.

    et-align judge --model RUN/best --input ITEMS.jsonl --output VERDICTS.jsonl [--thinking asked]

A judge that does not think returns the expectation over its labels. A judge that thinks writes its
thinking first, and the expectation is taken where it writes its label. Under torchrun the model is
laid out over the ranks as in training. For a judge behind an address use `et-align annotate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.config_groups import (
    EngineConfig,
    JudgeAnswerConfig,
    JudgeFormatConfig,
    ModelConfig,
    OutputConfig,
)
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, group, parse_config


@dataclass(frozen=True, kw_only=True)
class JudgeCommandConfig:
    """Flags of `et-align judge`."""

    files: OutputConfig = group()
    rows: RowsConfig = group()
    orders: Literal["both", "given", "swapped"] = flag("both")
    """Orders in which the two responses of a pair are shown to the judge."""
    samples: int = flag(1, metavar="N", at_least=1)
    """Number of verdicts on each question."""
    seq_length: int = flag(4096, metavar="TOKENS", at_least=1)
    """Maximum length of a question with its answer, in tokens."""
    max_failed: float = flag(0.2, metavar="SHARE", at_least=0, at_most=1)
    """Share of the questions that may end without a verdict, from 0 to 1. If more do, the command
    ends with status 3."""
    format: JudgeFormatConfig = group()
    answers: JudgeAnswerConfig = group()
    model: ModelConfig = group()
    engine: EngineConfig = group()

    def __post_init__(self) -> None:
        certain = self.format.thinking == "none" or self.answers.judging_temperature == 0
        if self.samples > 1 and certain:
            raise UserError(
                f"--samples {self.samples} would repeat the same verdicts. Set --thinking and a "
                "--judging-temperature above 0."
            )


def parse(argv: Sequence[str]) -> JudgeCommandConfig:
    """Return the configuration that a command line describes."""
    return parse_config(JudgeCommandConfig, argv, "et-align judge", __doc__)
