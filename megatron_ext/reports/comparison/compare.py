"""Comparison of runs as an HTML page and as Markdown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.reports.comparison.compared_runs import (
    ComparedRun,
    differences,
    group_runs,
    loss_unit,
    read_runs,
    tokenizers_differ,
)
from megatron_ext.reports.comparison.comparison_picture import draw_comparison
from megatron_ext.reports.comparison.final_metrics import NOTES, metrics_table
from megatron_ext.reports.comparison.text_bytes import BITS
from megatron_ext.reports.html import render

_TEMPLATE = Path(__file__).parents[1] / "templates" / "comparison.html"
_CURVES = "losses, thresholds, loads and fan-out against tokens"


def compare(paths: Sequence[str], output: Path, markdown: Path | None) -> None:
    """Write comparison.png, comparison.html and optionally a Markdown file.

    Args:
        paths: Run directories.
        output: Folder for the picture and the page.
        markdown: Markdown file to write, if any.

    Raises:
        UserError: A directory contains no run that can be compared.
    """
    runs = read_runs(paths)
    groups = group_runs(runs)
    picture, smoothing, panels = draw_comparison(groups)
    diverged = [f"In {run.name}, {run.metrics.divergence}." for run in runs]
    diverged = [sentence for run, sentence in zip(runs, diverged) if run.metrics.divergence]
    names = [group.name for group in groups]
    contents = Contents(
        title="Comparison of " + ", ".join(names),
        header=["", *names],
        metrics=metrics_table(groups),
        settings=[
            [name.replace("_", " "), *("" if value is None else str(value) for value in values)]
            for name, values in differences(groups).items()
        ],
        notes=" ".join(
            [*diverged, *_unit_notes(runs), *NOTES, f"Curves called smoothed are a {smoothing}."]
        ),
    )
    page = contents.html(panels).encode()
    output.mkdir(parents=True, exist_ok=True)  # nothing is written before everything is drawn
    file = output / "comparison.png"
    _write(file, picture)
    _write(output / "comparison.html", page)
    print(f"wrote {file} and {output / 'comparison.html'}")
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        _write(markdown, contents.markdown(os.path.relpath(file, markdown.parent)).encode())
        print(f"wrote {markdown}")
    for sentence in diverged:
        print(sentence)


def _unit_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Return sentences on the unit of the losses, where the tokenizers differ."""
    if not tokenizers_differ(runs):
        return []
    if loss_unit(runs) == BITS:
        return [
            "The tokenizers differ: losses are in bits per byte of text, from the bytes and tokens "
            "that the datasets' manifests record. Tokens are those of each run's tokenizer."
        ]
    return [
        "The tokenizers differ, and the manifests of the datasets do not record the bytes of their "
        "text: losses in nats per token cannot be compared between runs with different tokenizers."
    ]


@dataclass(frozen=True)
class Contents:
    """Content of the page and of the Markdown file.

    Attributes:
        title: Title of the comparison.
        header: Names of the columns; the first, of the labels, is empty.
        metrics: Rows of the table of metrics: a label, and a cell per group.
        settings: Rows of the settings that differ, likewise.
        notes: Explanation of the table.
    """

    title: str
    header: list[str]
    metrics: list[list[str]]
    settings: list[list[str]]
    notes: str

    def html(self, panels: Sequence[tuple[bytes, str]]) -> str:
        """Return the page.

        Args:
            panels: Each panel as a PNG with its title.
        """
        metrics, settings = self._tables()
        return render(
            _TEMPLATE,
            title=self.title,
            header=self.header,
            metrics=metrics,
            notes=self.notes,
            panels=panels,
            settings=settings if self.settings else [],
        )

    def markdown(self, picture: str) -> str:
        """Return the Markdown text.

        Args:
            picture: Path of the picture, relative to the Markdown file.
        """
        metrics, settings = (_markdown_table(self.header, rows) for rows in self._tables())
        parts = [f"# {self.title}", metrics, self.notes, f"![{_CURVES}]({picture})"]
        parts += ["## Settings that differ", settings if self.settings else "None."]
        return "\n\n".join(parts) + "\n"

    def _tables(self) -> tuple[list[list[str]], list[list[str]]]:
        return self.metrics, self.settings


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), rule, *map(line, rows)])


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
