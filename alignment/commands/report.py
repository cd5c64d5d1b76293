"""Command `et-align report`; its help is in `report_config`."""

import os
from collections.abc import Sequence
from pathlib import Path

from alignment.commands.report_config import ReportConfig, parse
from alignment.evaluation.study.narrative import opening, sentences
from alignment.evaluation.study.study_page import page
from alignment.evaluation.study.study_pictures import draw
from alignment.evaluation.study.study_reader import read_compared_runs, read_study
from megatron_ext.new_folder import check_output_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the command."""
    run(parse(argv))


def run(config: ReportConfig) -> None:
    """Write the report and print its sentences."""
    folders = [Path(run) for run in config.runs]
    if len(folders) > 1:
        study, output = read_compared_runs(folders), folders[0].resolve().parent / "comparison"
    else:
        study, output = read_study(folders[0]), folders[0] / "report"
    output = Path(config.output) if config.output else output
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    draw(study, output)
    file = output / "report.html"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # Texts of runs may hold unpaired surrogates, which UTF-8 cannot encode.
    temporary.write_text(page(study), encoding="utf-8", errors="backslashreplace")
    temporary.replace(file)
    print("\n".join([opening(study), *sentences(study), f"Wrote {file}."]))
