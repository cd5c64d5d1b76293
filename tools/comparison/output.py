"""The comparison as a page and as Markdown."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

from tools import page
from tools.comparison.figures import NOTES, figures_table
from tools.comparison.picture import draw_comparison
from tools.comparison.runs import differences, grouped, read_runs


def compare(paths: Sequence[str], output: Path, markdown: Path | None) -> None:
    """Write comparison.png and comparison.html to `output`, and Markdown where asked.

    Raises:
        UserError: a directory that holds no run that can be compared.
    """
    groups = grouped(read_runs(paths))
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "comparison.png"
    smoothing = draw_comparison(groups, picture)
    names = ["", *(group.name for group in groups)]
    figures = figures_table(groups)
    settings = [
        [name.replace("_", " "), *("" if value is None else str(value) for value in values)]
        for name, values in differences(groups).items()
    ]
    notes = [*NOTES, f"Curves named so are smoothed by a {smoothing}."]
    title = "Comparison of " + ", ".join(names[1:])
    text = _page(title, names, figures, settings, notes, picture.read_bytes())
    _write(output / "comparison.html", text)
    print(f"wrote {picture} and {output / 'comparison.html'}")
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        shown = os.path.relpath(picture, markdown.parent)
        _write(markdown, _markdown(title, names, figures, settings, notes, shown))
        print(f"wrote {markdown}")


def _page(
    title: str,
    names: list[str],
    figures: list[list[str]],
    settings: list[list[str]],
    notes: list[str],
    picture: bytes,
) -> str:
    curves = page.picture(picture, "losses, thresholds, loads and fan-out against tokens")
    return page.document(
        title,
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<div class="wide">{page.table(names, figures)}</div>',
            f'<p class="note">{html.escape(" ".join(notes))}</p>',
            curves,
            "<h2>Settings that differ</h2>",
            f'<div class="wide">{page.table(names, settings)}</div>'
            if settings
            else "<p>None.</p>",
        ],
    )


def _markdown(
    title: str,
    names: list[str],
    figures: list[list[str]],
    settings: list[list[str]],
    notes: list[str],
    picture: str,
) -> str:
    parts = [f"# {title}", _markdown_table(names, figures), " ".join(notes)]
    parts.append(f"![losses, thresholds, loads and fan-out against tokens]({picture})")
    parts += ["## Settings that differ", _markdown_table(names, settings) if settings else "None."]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), rule, *map(line, rows)])


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
