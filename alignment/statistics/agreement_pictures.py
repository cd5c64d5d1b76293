"""Pictures of agreement: the confusion matrix of two judges and their calibration curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from alignment.statistics.agreement_measures import AgreementData
from megatron_ext.reports.plotting import BLUE, GREY, STYLE, VERMILION, write_picture

_SIDES = {1.0: "first", 0.5: "tie", 0.0: "second"}


def draw(compared: AgreementData, names: Sequence[str], file: Path) -> None:
    """Write the confusion matrix and the calibration curve as one PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _confusion(left, compared, names)
        _calibration(right, compared, names)
        write_picture(figure, file)


def _confusion(axes: Axes, compared: AgreementData, names: Sequence[str]) -> None:
    """Draw the counts, shaded by their share of the row."""
    labels, counts = compared.confusion()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    color_map = LinearSegmentedColormap.from_list("blue", ["white", BLUE])
    axes.imshow(shares, cmap=color_map, vmin=0, vmax=1, origin="lower")
    if len(labels) <= 12:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                dark = shares[row, column] > 0.55
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center",
                          fontsize=8, color="white" if dark else "black")  # fmt: skip
    tick_labels = [_SIDES[x] if compared.a.pairwise else f"{x:g}" for x in labels]
    every = range(0, len(labels), max(1, len(labels) // 12))
    axes.set_xticks(list(every), [tick_labels[i] for i in every])
    axes.set_yticks(list(every), [tick_labels[i] for i in every])
    axes.set_xlabel(f"{names[1]} gives")
    axes.set_ylabel(f"{names[0]} gives")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Items by both labels, shaded within rows")


def _calibration(axes: Axes, compared: AgreementData, names: Sequence[str]) -> None:
    measured, reference, counts = np.reshape(compared.calibration(), (-1, 3)).T
    ends = (0.0, 1.0) if compared.a.pairwise else (min([0.0, *measured]), max([9.0, *measured]))
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="calibrated")
    sizes = 20 + 220 * counts / counts.max(initial=1)
    axes.plot(measured, reference, color=BLUE, linewidth=1)
    axes.scatter(measured, reference, s=sizes, color=VERMILION, alpha=0.8, linewidth=0,
                 label="mean of a bin; area by items")  # fmt: skip
    quantity = "share that prefers the first response" if compared.a.pairwise else "score"
    axes.set_xlabel(f"{quantity}, {names[1]}")
    axes.set_ylabel(f"{quantity}, {names[0]}, mean in the bin")
    axes.set_title("Calibration")
    axes.legend(loc="upper left")
