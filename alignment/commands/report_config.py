"""Write a report on a run of et-align train-policy, on several runs, or on a study.

    et-align report RUN [--output FOLDER]
    et-align report RUN RUN ... [--output FOLDER]
    et-align report STUDY [--output FOLDER]

The report is report.html, a page that needs no other file, and its pictures as PNG and SVG. Several
runs are compared under the names of their folders; runs whose settings differ in the seed only are
seeds of one arm. STUDY is a folder with study.json, which names the runs, and one folder per run.
Unfinished runs are reported up to their last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.typed_flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `et-align report`."""

    runs: tuple[str, ...] = flag(positional=True, metavar="RUN")
    """Folder of a run, or of several runs to compare, or of a study."""
    output: str | None = flag(None, metavar="FOLDER")
    """Folder to write the report into. Default: report in the folder of the run or study, or
    comparison next to the first of several runs."""


def parse(argv: Sequence[str] | None) -> ReportConfig:
    """Return the configuration that a command line describes."""
    return parse_config(ReportConfig, argv, "et-align report", __doc__)
