"""Show what a study of policies and judges found, or one run of it.

    et-align report STUDY [--output FOLDER]

Writes report.html, a page that needs no other file, and its pictures as PNG and SVG. STUDY has
study.json and a folder a run, or is a run of et-align train-policy; while runs go on, too.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from alignment.evaluation.study.narrative import opening, sentences
from alignment.evaluation.study.study_page import page
from alignment.evaluation.study.study_pictures import draw
from alignment.evaluation.study.study_runs import read_study
from alignment.new_output_folder import check_folder
from megatron_ext.errors import ToolParser, run_tool


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    folder = Path(options.study)
    study = read_study(folder)
    output = Path(options.output) if options.output else folder / "report"
    check_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw(study, output)
    file = output / "report.html"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # What runs tell of themselves may hold halves of letters too.
    temporary.write_text(page(study, pictures), encoding="utf-8", errors="backslashreplace")
    temporary.replace(file)
    print("\n".join([opening(study), *sentences(study), f"wrote {file}"]))


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help="folder of a study or of a run")
    parser.add_argument("--output", metavar="FOLDER", help="(STUDY/report)")
    return parser


if __name__ == "__main__":
    run_tool(main)
