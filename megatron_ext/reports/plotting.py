"""Colors, style, smoothing and file output that all pictures share."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ext.reports.run_metrics import Floats

# Okabe and Ito's palette, whose colors remain distinct with color blindness.
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
    """Write a picture atomically.

    Args:
        figure: Figure to draw.
        path: File to write. Its suffix selects the format; without a suffix it is PNG.
        dpi: Resolution in dots per inch.
    """
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    temporary.replace(path)


def smoothed(at: Floats, values: Floats, window: int) -> tuple[Floats, Floats]:
    """Return the running mean of a curve.

    Args:
        at: Positions `[n]`.
        values: Values at the positions, `[n]`.
        window: Number of values in each mean.

    Returns:
        Mean positions and mean values, `[n - window + 1]` each if the window fits.
    """
    kernel = np.ones(window) / window
    return np.convolve(at, kernel, "valid"), np.convolve(values, kernel, "valid")


def nothing_yet(axes: Axes, what: str) -> None:
    """Write into an empty panel that the log has nothing to draw."""
    axes.text(0.5, 0.5, f"no {what} in this log", color=GREY, ha="center", va="center")
    axes.set_axis_off()
