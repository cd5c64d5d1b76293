"""Picture of a run: loss, routing over steps, loads, fan-out, and a text colored by fan-out.

The page of the run shows the same panels, one below the other on a narrow screen.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from megatron_ext.inspection.routed_text import RoutedText, draw_text, lines_of
from megatron_ext.inspection.routed_text import height as text_height
from megatron_ext.reports.plotting import STYLE, panel_png, write_picture
from megatron_ext.reports.run_metrics import RunMetrics
from megatron_ext.reports.run_panels import routing_panels, run_panels


def page_panels(
    metrics: RunMetrics, baselines: Mapping[str, float], final: tuple[int, float] | None = None
) -> list[tuple[bytes, str]]:
    """Return each panel as a PNG with its description; see `draw` for the arguments."""
    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        return [
            (panel_png(panel.draw), panel.title) for panel in run_panels(metrics, baselines, final)
        ]


def draw(
    metrics: RunMetrics,
    path: Path,
    title: str,
    baselines: Mapping[str, float],
    final: tuple[int, float] | None = None,
    text: RoutedText | None = None,
) -> None:
    """Write the picture of a run atomically.

    Args:
        metrics: Metrics of the run.
        path: File to write.
        title: Title of the picture.
        baselines: Losses to compare with by name, in nats per token.
        final: Step and loss of an evaluation after training.
        text: Text to color by fan-out.
    """
    matplotlib.use("agg")
    panels = run_panels(metrics, baselines, final)
    places = (("loss", "usage"), ("thresholds",), ("loads", "fan_out"))
    rows = [[panel for panel in panels if panel.kind in names] for names in places]
    rows = [row for row in rows if row]
    lines = lines_of(text) if text else []
    heights = [3.1, *[2.5] * (len(rows) - 1)]
    heights += [text_height(lines)] if text else []
    gap, top, bottom = 0.85, 0.95, 0.55  # inches; a gap has an axis and the next title
    height = sum(heights) + gap * (len(heights) - 1) + top + bottom
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, height))
        figure.text(0.06, 1 - 0.35 / height, title, fontsize=13)
        grid = GridSpec(
            len(heights), 1, figure, height_ratios=heights, hspace=gap / float(np.mean(heights)),
            left=0.06, right=0.98, top=1 - top / height, bottom=bottom / height,
        )  # fmt: skip
        for place, row in enumerate(rows):
            columns = grid[place].subgridspec(1, len(row), wspace=0.24 if len(row) < 3 else 0.2)
            for column, panel in enumerate(row):
                panel.draw(figure.add_subplot(columns[column]))
        if text:
            draw_text(figure.add_subplot(grid[-1]), text, lines)
        write_picture(figure, path)


def draw_panels(metrics: RunMetrics, folder: Path) -> list[Path]:
    """Write the panels on routing as separate pictures, and return their paths.

    Args:
        metrics: Metrics of the run.
        folder: Folder for the pictures; it is created if it does not exist.
    """
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    panels = routing_panels(metrics)
    with matplotlib.rc_context(STYLE):
        for name in dict.fromkeys(panel.kind for panel in panels):
            row = [panel for panel in panels if panel.kind == name]
            figure = Figure(figsize=(12 if name == "thresholds" else 7, 3), layout="constrained")
            for axes, panel in zip(figure.subplots(1, len(row), squeeze=False).flat, row):
                panel.draw(axes)
            paths.append(folder / f"{name}.png")
            write_picture(figure, paths[-1])
    return paths
