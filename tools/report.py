"""Report a pretraining run, or compare several runs.

    python -m tools.report --run-dir runs/NAME [--unigram NATS --bigram NATS] [--text-file FILE]
        [--panels DIR]
    python -m tools.report runs/A runs/B ... [--output DIR] [--markdown FILE]

For one run, the command writes report.png and report.html to the run's directory. The run may be
unfinished or resumed. The report includes these files of the directory, if they exist: run.json
(the configuration), validation.json (final loss and baselines, as the quickstart writes it),
sample.json (a line of `tools.generate --json`) and text.txt, which the newest checkpoint routes to
show the fan-out of its tokens.

For several runs, it writes comparison.png and comparison.html with tables and curves against
training tokens. Runs that differ in their seed only are shown as mean and standard deviation.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.inspection.routed_text import RoutedText, route
from megatron_ext.json_numbers import load_json
from megatron_ext.quiet import quiet_megatron
from megatron_ext.reports.run_metrics import RunMetrics, refuse_policy_run, summary
from megatron_ext.reports.run_page import Page
from megatron_ext.reports.run_picture import draw, draw_panels, page_panels

_MAX_CHARACTERS = 1200  # number of characters that fit in a picture
_OF_ONE_RUN = ("unigram", "bigram", "validation", "sample", "text_file", "panels")
_OF_SEVERAL = ("output", "markdown")


class ReportFlags:
    """Values of the command line."""

    runs: list[str]
    run_dir: str | None
    unigram: float | None
    bigram: float | None
    validation: str | None
    sample: str | None
    text_file: str | None
    panels: str | None
    output: str | None
    markdown: str | None


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(argv, ReportFlags())
    runs = [*([options.run_dir] if options.run_dir else []), *options.runs]
    _check_flags(options, len(runs))
    if len(runs) > 1:
        from megatron_ext.reports.comparison.compare import compare

        markdown = Path(options.markdown) if options.markdown else None
        compare(runs, Path(options.output or Path(runs[0]).resolve().parent), markdown)
    else:
        report(Path(runs[0]), options)


def report(run_dir: Path, options: ReportFlags) -> None:
    """Write report.png and report.html of one run, and print its losses."""
    refuse_policy_run(run_dir)
    metrics = RunMetrics.read(run_dir)
    validation = _optional_json(options.validation or run_dir / "validation.json", load_json)
    for name in ("unigram", "bigram"):
        if (value := getattr(options, name)) is not None:
            validation[name] = value
    final = (validation["step"], validation["validation"]) if "step" in validation else None
    if metrics.evaluations:
        step, loss = list(metrics.evaluations.items())[-1]
        if validation.get("step", step) < step:  # the run was trained further
            validation = {n: validation[n] for n in ("unigram", "bigram") if n in validation}
        validation.setdefault("validation", loss)
    text_file = Path(options.text_file or run_dir / "text.txt")
    text = None
    if options.text_file or text_file.is_file():
        text = route_text(run_dir, _read(text_file))
    names: list[str] = [name for name in ("unigram", "bigram") if name in validation]
    baselines = {name: float(validation[name]) for name in names}
    headline = summary(validation)
    title = f"{run_dir.name}: {headline}" if headline else run_dir.name
    page = Page(
        run=run_dir.name,
        summary=headline,
        metrics=metrics,
        panels=page_panels(metrics, baselines, final),
        configuration=_optional_json(run_dir / "run.json"),
        validation=validation,
        sample=_optional_json(options.sample or run_dir / "sample.json"),
        text=text,
    )
    html = page.html()
    draw(metrics, run_dir / "report.png", title, baselines, final, text)
    target = run_dir / "report.html"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(target)
    print(f"wrote {run_dir / 'report.png'} and {target}")
    for sentence in filter(None, (page.divergence, page.unfinished)):
        print(sentence)
    if options.panels and metrics.layers:
        print(f"wrote {', '.join(map(str, draw_panels(metrics, Path(options.panels))))}")
    if headline:
        print(headline)


def route_text(run_dir: Path, text: str) -> RoutedText:
    """Route the beginning of a text, at most one context length, with the newest checkpoint.

    Raises:
        UserError: There is no checkpoint, the text is empty, or the model has no experts.
    """
    with quiet_megatron():
        from megatron_ext.devices import activate

        activate()
        from megatron_ext.data.document_tokens import DocumentTokens
        from megatron_ext.inference.loading import load_model

        trained = load_model(run_dir)
        tokens = DocumentTokens(trained.tokenizer).beginning(text[:_MAX_CHARACTERS])
        try:
            return route(trained, tokens[: trained.max_length])
        except ValueError as error:
            raise UserError(f"The text cannot be routed: {error}") from error


def _check_flags(options: ReportFlags, runs: int) -> None:
    if not runs:
        raise UserError(
            "There is no run to show. Name the directory of a run, or several to compare them."
        )
    names = _OF_ONE_RUN if runs > 1 else _OF_SEVERAL
    name = next((name for name in names if getattr(options, name) is not None), None)
    if name:
        problem = (
            "one run. Leave it out, or name one run only."
            if runs > 1
            else "a comparison. Leave it out, or name two or more runs."
        )
        raise UserError(f"--{name.replace('_', '-')} is for {problem}")


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("runs", nargs="*", metavar="DIR", help="Directory of the run to report, or of the runs to "
        "compare.")
    add("--run-dir", metavar="DIR", help="Directory of a run, like the argument without a flag.")
    add("--unigram", type=float, metavar="NATS",
        help="Loss of a unigram baseline to draw, in nats per token.")
    add("--bigram", type=float, metavar="NATS",
        help="Loss of a bigram baseline to draw, in nats per token.")
    add("--validation", metavar="FILE",
        help="JSON file with the losses unigram, bigram and validation, in nats per token. "
             "Default: validation.json of the run, if it exists.")
    add("--sample", metavar="FILE",
        help="File with a line of tools.generate --json. Default: sample.json of the run, if it "
             "exists.")
    add("--text-file", metavar="FILE",
        help="Text to color by the fan-out of its tokens. Default: text.txt of the run, if it "
             "exists.")
    add("--panels", metavar="DIR",
        help="Folder for separate pictures of the panels on routing. Default: none are written.")
    add("--output", metavar="DIR",
        help="Folder for the comparison. Default: the folder that contains the first run.")
    add("--markdown", metavar="FILE",
        help="Markdown file for the comparison. Default: none is written.")
    # fmt: on
    return parser


def _optional_json(path: Path | str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """Return the JSON object in a file, empty if the file does not exist.

    Raises:
        UserError: The file does not contain a JSON object.
    """
    if not Path(path).is_file():
        return {}
    try:
        value = parse(_read(Path(path)))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not contain a JSON object.")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    run_tool(main)
