"""Colors, style, smoothing and file output that all pictures share."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ext.reports.run_metrics import Floats

# Okabe and Ito's palette, whose colors remain distinct with color blindness.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
CYCLE = [BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000", "#B8A900"]
# Curves differ in line style and marker too: equal ones are legible, and prints without color.
LINES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5))]
MARKERS = "osD^vP*X"
_MARKED_POINTS = 30  # a curve with more points has a marker at some of them only
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "font.size": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Panel:
    """Panel of a picture or page.

    Attributes:
        title: Description of the content, also for readers who cannot see the panel.
        draw: Function that draws it on some axes.
        kind: Kind of the panel, by which pictures arrange panels.
    """

    title: str
    draw: Callable[[Axes], object]
    kind: str = ""


def write_picture(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a picture atomically.

    Args:
        figure: Figure to draw.
        path: File to write. Its suffix selects the format; without a suffix it is PNG.
        dpi: Resolution in dots per inch.
    """
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    temporary.replace(path)


def smoothed(positions: Floats, values: Floats, window: int) -> tuple[Floats, Floats]:
    """Return the running mean of a curve.

    Args:
        positions: Positions `[n]`.
        values: Values at the positions, `[n]`.
        window: Number of values in each mean.

    Returns:
        Mean positions and mean values, `[n - window + 1]` each if the window fits.
    """
    kernel = np.ones(window) / window
    return np.convolve(positions, kernel, "valid"), np.convolve(values, kernel, "valid")


def draw_curve(
    axes: Axes, positions: Floats, values: Floats, number: int, label: str, **settings: Any
) -> None:
    """Draw one of several curves, whose color, line style and marker depend on its number.

    Later curves are thinner and have smaller markers, so that earlier ones remain visible below.

    Args:
        axes: Axes to draw on.
        positions: Positions `[n]`.
        values: Values `[n]`.
        number: Number of the curve, from 0.
        label: Name in the legend.
        **settings: Settings of matplotlib that replace those of the number.
    """
    every = max(1, len(positions) // 12) if len(positions) > _MARKED_POINTS else 1
    style: dict[str, Any] = {
        "color": CYCLE[number % len(CYCLE)],
        "ls": LINES[(number + number // len(CYCLE)) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "lw": max(1.3, 2.4 - 0.35 * number),
        "ms": max(3.0, 6.0 - 0.8 * number),
        "markevery": (number % every, every),
        "markerfacecolor": "none" if number % 2 == 0 else None,
        "clip_on": False,
        "zorder": 2 + 0.01 * number,
    }
    if style["markerfacecolor"] is None:
        del style["markerfacecolor"]
    axes.plot(positions, values, label=label, **(style | settings))


def panel_png(draw: Callable[[Axes], object], size: tuple[float, float] = (4.8, 3.0)) -> bytes:
    """Return one panel as a PNG, for a page with panels in one or more columns.

    Args:
        draw: Function that draws on the axes.
        size: Width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure_png(figure, 150)


def figure_png(figure: Figure, dpi: int) -> bytes:
    """Return a figure as a PNG.

    Args:
        figure: Figure to draw.
        dpi: Resolution in dots per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()
