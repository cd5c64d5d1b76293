"""Collect verdicts of a judge, or responses of a policy, and store every answer.

    et-align annotate --input FILE --output FILE --judge http://HOST:PORT/v1 --model NAME
    et-align annotate --input FILE --output FILE --judge rule --rule-text FILE
    et-align annotate --input FILE --output FILE --judge function:CHECKS.py:score
    et-align annotate --input FILE --output FILE --judge JUDGE.yaml

Repeat the command to resume a run that was stopped or killed. --output is written when every
question has an answer or has failed; until then the answers are in --cache. The exit status is 3 if
a larger share of the questions than --max-failed has no result, and 4 if --max-cost allows no
further call. --dry-run estimates the cost of a run before anything is spent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.annotation_judge_config import AnnotationJudgeConfig
from alignment.commands.config_groups import OutputConfig
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, group, parse_config

Orders = Literal["both", "given", "swapped"]


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Flags of `et-align annotate`."""

    files: OutputConfig = group()
    rows: RowsConfig = group()
    generate: bool = flag(False)
    """Answer prompts instead of judging responses or pairs."""
    rubrics: bool = flag(False)
    """Write a rubric for each prompt, which states what a good answer contains. Judges whose
    template shows a rubric require them."""
    orders: Orders = flag("both")
    """Orders in which the two responses of a pair are shown to the judge."""
    dry_run: bool = flag(False)
    """Estimate the calls, tokens, hours and dollars of the run, without making a call or writing a
    file."""
    judge: AnnotationJudgeConfig = group()

    def __post_init__(self) -> None:
        if not self.judge.judge:
            raise UserError("annotate requires --judge. See et-align annotate --help.")
        self.judge.check(self.generate, self.rubrics)


def parse(argv: Sequence[str] | None) -> AnnotateConfig:
    """Return the configuration that a command line describes."""
    return parse_config(AnnotateConfig, argv, "et-align annotate", __doc__)
