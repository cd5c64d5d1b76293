r"""Detect responses that game a judge, or measure how reliable the detectors are.

    et-align monitor --input RESPONSES.jsonl [--verdicts VERDICTS.jsonl] [--output FLAGS.jsonl]
    et-align monitor --input RESPONSES.jsonl --judge http://HOST:PORT/v1 --model NAME \
        --judge-verdicts GAMING.jsonl
    et-align monitor --fixtures [FILE ...] [--folds N]

The command prints the share of the responses on which each detector fires, its limit, and an
example. With --fixtures it prints precision and recall with 95 % intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.commands.annotation_judge_config import AnnotationJudgeConfig
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.new_folder import check_output_folder
from megatron_ext.typed_flags import flag, group, parse_config

ALARMED = 3
"""Exit status with --fail-on-alarm."""

_GAMING = "pointwise-gaming"  # template of the judge's prompt


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Flags of `et-align monitor`."""

    input: str | None = flag(None, metavar="FILE")
    """Responses to monitor, .jsonl or .parquet. Default: none; --fixtures is measured."""
    verdicts: str | None = flag(None, metavar="FILE")
    """Scores of the responses, to correlate with their lengths. Default: none."""
    reference_lengths: str | None = flag(None, metavar="FILE")
    """Responses that are known to be sound, such as those of the start policy. Their lengths in
    words determine which responses are verbose. Default: those of --input."""
    limits: str | None = flag(None, metavar="FILE")
    """YAML file of the shares, from 0 to 1, above which detectors raise an alarm. Default: the
    limits of the detectors."""
    output: str | None = flag(None, metavar="FILE")
    """File to write, .jsonl, with the detectors that fire on each response, and the words on which
    they fire. Default: none."""
    overwrite: bool = flag(False)
    """Replace --output and --judge-verdicts."""
    fail_on_alarm: bool = flag(False)
    """Exit with status 3 when there is an alarm."""
    fixtures: tuple[str, ...] | None = flag(None, metavar="FILE", value_if_bare=tuple)
    """Measure the detectors on labeled texts. Without a file: on those of the package. Default:
    monitor --input."""
    folds: int = flag(0, metavar="N")
    """Number of folds of a cross-validation over wordings, by which --fixtures is measured. Texts
    of the package with other wordings are always in the training folds. Default: 0, no
    cross-validation."""
    judge_verdicts: str | None = flag(None, metavar="FILE")
    """File of a judge's verdicts, from 0 to 9, on whether responses game their judge. With --judge
    it is written, otherwise read. Default: none."""
    rows: RowsConfig = group()
    judge: AnnotationJudgeConfig = group()

    def __post_init__(self) -> None:
        if (self.fixtures is None) == (self.input is None):
            raise UserError("Pass responses as --input, or --fixtures to measure the detectors.")
        if self.fixtures is not None:
            self._check_fixtures()
        elif self.folds:
            raise UserError("--folds requires --fixtures.")
        if self.judge.judge:
            self._check_judge()
        else:
            self.judge.check_unused()
        if self.output:
            self._check_output(Path(self.output))

    @property
    def gaming_judge(self) -> AnnotationJudgeConfig:
        """Judge of whether responses game their judge, with its template."""
        if self.judge.template or not self.judge.at_endpoint:
            return self.judge
        return replace(self.judge, template=_GAMING)

    def _check_fixtures(self) -> None:
        used = {
            "--verdicts": self.verdicts,
            "--limits": self.limits,
            "--reference-lengths": self.reference_lengths,
            "--output": self.output,
            "--fail-on-alarm": self.fail_on_alarm,
            "--judge": self.judge.judge,
            "--judge-verdicts": self.judge_verdicts,
        }
        for option, value in used.items():
            if value:
                raise UserError(f"{option} requires --input and is incompatible with --fixtures.")
        if self.folds < 0 or self.folds == 1:
            raise UserError(f"--folds {self.folds} must be 0 or at least 2.")

    def _check_judge(self) -> None:
        if self.judge.judge.startswith("rule"):
            raise UserError(
                f"--judge {self.judge.judge} judges the quality of text, not whether it games a "
                "judge. Give the address of a model or function:FILE.py:NAME."
            )
        if not self.judge_verdicts:
            raise UserError("--judge requires --judge-verdicts, the file to store its verdicts in.")
        self.gaming_judge.check()

    def _check_output(self, output: Path) -> None:
        if output.is_dir():
            raise UserError(f"--output {output} is a folder. Give a file.")
        check_output_folder(output.parent)
        if output.exists() and not self.overwrite:
            raise UserError(f"--output {output} exists already. Give --overwrite to replace it.")


def parse(argv: Sequence[str] | None) -> MonitorConfig:
    """Return the configuration that a command line describes."""
    return parse_config(MonitorConfig, argv, "et-align monitor", __doc__)
