"""What all pictures share: colours, style, smoothing, and writing a file whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ext.reports.run_metrics import Floats

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
CYCLE = [BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000", "#B8A900"]
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


def write_picture(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a PNG, or an SVG by its suffix, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    temporary.replace(path)


def smoothed(at: Floats, values: Floats, window: int) -> tuple[Floats, Floats]:
    """A running mean over so many values, each at the middle of its window."""
    kernel = np.ones(window) / window
    return np.convolve(at, kernel, "valid"), np.convolve(values, kernel, "valid")


def nothing_yet(axes: Axes, what: str) -> None:
    """Say in place of a panel that there is nothing to draw."""
    axes.text(0.5, 0.5, f"no {what} in this log", color=GREY, ha="center", va="center")
    axes.set_axis_off()
