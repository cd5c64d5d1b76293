"""Draw what a run did, or compare several.

    python -m tools.report --run-dir runs/NAME [--unigram NATS --bigram NATS] [--text-file FILE]
        [--panels DIR]
    python -m tools.report runs/A runs/B ... [--output DIR] [--markdown FILE]

One run: report.png, and report.html with the figures and texts, in the run's directory; while a run
goes on, too, and after it was resumed. What the run directory also holds is shown: run.json
(configuration), validation.json (final loss and baselines, as the quickstart writes it),
sample.json (as `tools.generate --json` prints it) and text.txt, which the newest checkpoint routes
to show how many experts each token gets.

Several: comparison.png and comparison.html, tables and curves against tokens. Runs that differ in
their seed alone are shown as mean and standard deviation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.inspection.routed_text import RoutedText, route
from megatron_ext.quiet import quiet_megatron
from megatron_ext.reports.run_metrics import RunMetrics, summary
from megatron_ext.reports.run_page import Page
from megatron_ext.reports.run_picture import draw, draw_panels

_LONGEST_TEXT = 1200  # characters; a picture holds no more
_OF_ONE_RUN = ("unigram", "bigram", "validation", "sample", "text_file", "panels")
_OF_SEVERAL = ("output", "markdown")


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    runs = [*([options.run_dir] if options.run_dir else []), *options.runs]
    _refuse_what_does_not_fit(options, len(runs))
    if len(runs) > 1:
        from megatron_ext.reports.comparison.compare import compare

        markdown = Path(options.markdown) if options.markdown else None
        compare(runs, Path(options.output or Path(runs[0]).resolve().parent), markdown)
    else:
        report(Path(runs[0]), options)


def report(run_dir: Path, options: argparse.Namespace) -> None:
    """Write report.png and report.html of one run."""
    metrics = RunMetrics.read(run_dir)
    validation = _optional_json(options.validation or run_dir / "validation.json")
    for name in ("unigram", "bigram"):
        if (value := getattr(options, name)) is not None:
            validation[name] = value
    if metrics.evaluations:
        validation.setdefault("validation", list(metrics.evaluations.values())[-1])
    text_file = Path(options.text_file or run_dir / "text.txt")
    text = None
    if options.text_file or text_file.is_file():
        text = route_text(run_dir, _read(text_file))
    names: list[str] = [name for name in ("unigram", "bigram") if name in validation]
    baselines = {name: float(validation[name]) for name in names}
    headline = summary(validation)
    title = f"{run_dir.name}: {headline}" if headline else run_dir.name
    final = (validation["step"], validation["validation"]) if "step" in validation else None
    draw(metrics, run_dir / "report.png", title, baselines, final, text)
    page = Page(
        run=run_dir.name,
        summary=headline,
        metrics=metrics,
        picture=(run_dir / "report.png").read_bytes(),
        configuration=_optional_json(run_dir / "run.json"),
        validation=validation,
        sample=_optional_json(options.sample or run_dir / "sample.json"),
        text=text,
    )
    target = run_dir / "report.html"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page.html(), encoding="utf-8")
    temporary.replace(target)
    print(f"wrote {run_dir / 'report.png'} and {target}")
    if options.panels and metrics.layers:
        print(f"wrote {', '.join(map(str, draw_panels(metrics, Path(options.panels))))}")
    if headline:
        print(headline)


def route_text(run_dir: Path, text: str) -> RoutedText:
    """Send a text, or as much as the model takes at once, through the newest checkpoint.

    Raises:
        UserError: no checkpoint, no text, or a model without experts.
    """
    with quiet_megatron():
        from megatron_ext.devices import activate

        activate()
        from megatron_ext.inference.loading import load_model

        trained = load_model(run_dir)
        tokens = trained.tokenizer.tokenize(text[:_LONGEST_TEXT])[: trained.max_length]
        try:
            return route(trained, tokens)
        except ValueError as error:
            raise UserError(f"the text cannot be routed: {error}") from error


def _refuse_what_does_not_fit(options: argparse.Namespace, runs: int) -> None:
    if not runs:
        raise UserError("no run to show: give its directory, or those of several to compare")
    names = _OF_ONE_RUN if runs > 1 else _OF_SEVERAL
    given = next((name for name in names if getattr(options, name) is not None), None)
    if given:
        expected = "one run" if runs > 1 else "a comparison: give two or more runs"
        raise UserError(f"--{given.replace('_', '-')} is for {expected}")


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="DIR", help="run to show, or runs to compare")
    add("--run-dir", metavar="DIR", help="the same")
    add("--unigram", type=float, metavar="NATS", help="loss per token of a unigram baseline")
    add("--bigram", type=float, metavar="NATS", help="loss per token of a bigram baseline")
    add("--validation", metavar="FILE", help="JSON with unigram, bigram, validation")
    add("--sample", metavar="FILE", help="a line of tools.generate --json")
    add("--text-file", metavar="FILE", help="text to colour by the experts its tokens get")
    add("--panels", metavar="DIR", help="write the panels on routing there, a picture each")
    add("--output", metavar="DIR", help="for the comparison (the folder that the first run is in)")
    add("--markdown", metavar="FILE", help="write the comparison as Markdown too")
    return parser


def _optional_json(path: Path | str) -> dict[str, Any]:
    """The object in a file; empty without the file.

    Raises:
        UserError: the file holds something else.
    """
    if not Path(path).is_file():
        return {}
    try:
        value = json.loads(_read(Path(path)))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    run_tool(main)
