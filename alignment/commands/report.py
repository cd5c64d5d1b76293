"""Command `et-align report`; its help is in `report_config`."""

import os
from collections.abc import Sequence
from pathlib import Path

from alignment.commands.report_config import ReportConfig, parse
from alignment.evaluation.study.narrative import opening, sentences
from alignment.evaluation.study.study_page import page
from alignment.evaluation.study.study_pictures import draw
from alignment.evaluation.study.study_runs import read_study
from megatron_ext.new_folder import check_output_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the command."""
    run(parse(argv))


def run(config: ReportConfig) -> None:
    """Write the report and print its sentences."""
    folder = Path(config.study)
    study = read_study(folder)
    output = Path(config.output) if config.output else folder / "report"
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw(study, output)
    file = output / "report.html"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # Texts of runs may hold unpaired surrogates, which UTF-8 cannot encode.
    temporary.write_text(page(study, pictures), encoding="utf-8", errors="backslashreplace")
    temporary.replace(file)
    print("\n".join([opening(study), *sentences(study), f"Wrote {file}."]))
