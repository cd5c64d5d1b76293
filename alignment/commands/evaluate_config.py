"""Compare policies by judges: mean scores, win rates against a baseline, Bradley-Terry strengths.

    et-align evaluate --responses BASE.jsonl A.jsonl B.jsonl --baseline BASE.jsonl --output DIR
        --judge http://HOST:PORT/v1 --model NAME --judge rule --rule-text FILE
    et-align evaluate --responses BASE.jsonl A.jsonl --baseline BASE.jsonl
        --verdicts NAME=FILE NAME=FILE

Flags of judges that follow a --judge apply to that judge; those before the first --judge apply to
every judge. --output holds the judged records (responses.jsonl, pairs.jsonl), the verdicts of each
judge and evaluation.json. Repeat the command to resume a run that was stopped or killed. Without
--judge and --verdicts the command writes the records to judge, for et-align annotate.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.annotation_judge_config import AnnotationJudgeConfig
from alignment.commands.rows_config import RowsConfig
from alignment.judges.formats.scale import check_scale
from megatron_ext.errors import UserError
from megatron_ext.new_folder import check_output_folder
from megatron_ext.typed_flags import flag, group, parse_config

SCORES, PREFERENCES = "scores", "preferences"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Flags of `et-align evaluate`."""

    responses: tuple[str, ...] = flag((), metavar="FILE")
    """Responses of the policies, one file for each policy, including the baseline; required."""
    baseline: str | None = flag(None, metavar="FILE")
    """File of --responses whose policy is the baseline of all comparisons; required."""
    verdicts: tuple[str, ...] = flag((), metavar="NAME=FILE")
    """Verdicts of a judge on these responses, or on the pairs in --output. Several files of one
    judge are joined. Default: none."""
    verdicts_scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score in --verdicts, whose scores are mapped to 0 to 9. Default: 0 9."""
    common: bool = flag(False)
    """Compare only on the prompts that all policies answered and that were judged."""
    output: str | None = flag(None, metavar="DIR")
    """Folder for the judged records, the verdicts and evaluation.json; required with --judge.
    Default: none."""
    overwrite: bool = flag(False)
    """Replace verdicts in --output that were made with other settings."""
    resamples: int = flag(1000, metavar="N", at_least=1)
    """Number of resamples of the bootstrap over prompts."""
    resample_seed: int = flag(0, metavar="N", at_least=0, below=2**32)
    """Seed of the bootstrap."""
    name: str | None = flag(None, metavar="NAME")
    """Name of the judge in tables. Default: that of --model, or otherwise of --judge."""
    ask: Literal["both", "scores", "preferences"] = flag("both")
    """Kind of verdicts to collect from the judge."""
    rows: RowsConfig = group()
    judge: AnnotationJudgeConfig = group()

    def __post_init__(self) -> None:
        if self.verdicts_scale:
            check_scale(self.verdicts_scale, "--verdicts-scale")

    @property
    def judge_name(self) -> str:
        """Name of the judge in tables."""
        return self.name or self.judge.model or self.judge.judge

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of verdicts to collect from the judge."""
        return (SCORES, PREFERENCES) if self.ask == "both" else (self.ask,)


@dataclass(frozen=True)
class Evaluation:
    """A whole command line.

    Attributes:
        config: Flags of the comparison.
        judges: Flags that apply to each judge.
        max_failed: Share of the verdicts in a file of --verdicts that may have failed.
    """

    config: EvaluateConfig
    judges: Sequence[EvaluateConfig]
    max_failed: float

    def __post_init__(self) -> None:
        config = self.config
        if len(config.responses) < 2:
            raise UserError(
                "--responses requires the files of two policies or more, with the baseline among "
                "them."
            )
        if not config.baseline:
            raise UserError("evaluate requires --baseline, one of the files of --responses.")
        if not config.output and (self.judges or not config.verdicts):
            raise UserError("evaluate requires --output, the folder to store the answers in.")
        if not self.judges:
            config.judge.check_unused()
        if config.output:
            check_output_folder(config.output)
        names = [(file_name(judge.judge_name), k) for judge in self.judges for k in judge.kinds]
        if repeated := [name for name, kind in names if names.count((name, kind)) > 1]:
            raise UserError(
                f"Two judges have the name {repeated[0]}. Give them different names by --name."
            )


def file_name(name: str) -> str:
    """Return the name of a judge as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def parse(argv: Sequence[str] | None) -> Evaluation:
    """Return the evaluation that a command line describes."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = _parse_flags(words)
    starts = [n for n, word in enumerate(words) if word == "--judge" or word[:8] == "--judge="]
    shared = words[: starts[0]] if starts else words
    judges = []
    for start, end in itertools.pairwise([*starts, len(words)]):
        judge = _parse_flags([*shared, *words[start:end]])
        judge.judge.check()
        if judge.judge.template and judge.ask == "both":
            raise UserError(
                f"--template {judge.judge.template} is either for scores or for preferences. "
                "Choose one with --ask, and give the judge twice for both."
            )
        judges.append(judge)
    return Evaluation(config, judges, _parse_flags(shared).judge.max_failed)


def _parse_flags(words: Sequence[str]) -> EvaluateConfig:
    return parse_config(EvaluateConfig, words, "et-align evaluate", __doc__)
