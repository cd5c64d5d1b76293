"""Write a report on a study of policies and judges, or on one run of it.

    et-align report STUDY [--output FOLDER]

The report is report.html, a page that needs no other file, and its pictures as PNG and SVG. STUDY
is a folder with study.json and one folder per run, or the folder of a run of et-align train-policy.
Runs that have not ended are reported as far as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.typed_flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `et-align report`."""

    study: str = flag(positional=True, metavar="STUDY")
    """Folder of a study or of a run."""
    output: str | None = flag(None, metavar="FOLDER")
    """Folder to write the report into. Default: STUDY/report."""


def parse(argv: Sequence[str] | None) -> ReportConfig:
    """Return the configuration that a command line describes."""
    return parse_config(ReportConfig, argv, "et-align report", __doc__)
