"""Picture of the metrics of runs against training tokens."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_ext.reports.comparison.compared_runs import RunGroup
from megatron_ext.reports.plotting import CYCLE, STYLE, smoothed, write_picture

_WINDOWS = 50  # number of smoothing windows in the longest run
_UNITS = ((1e9, " B"), (1e6, " M"), (1e3, " k"))
_PANELS = (
    ("loss", "Training loss", "loss (nats per token)", True),
    ("val_loss", "Validation loss", "loss (nats per token)", False),
    ("threshold", "Thresholds, mean of experts and layers", "router logit", False),
    ("load_max_over_mean", "Load", "busiest expert / mean (mean of layers)", True),
    ("fan_out", "Fan-out", "routed experts per token (mean of layers)", True),
    ("no_expert_share", "Tokens without a routed expert", "share (mean of layers)", True),
)


def draw_comparison(groups: Sequence[RunGroup], path: Path) -> str:
    """Write the picture of a comparison, without the panels that no run has.

    Returns:
        Description of the smoothing.
    """
    matplotlib.use("agg")
    curves = {name: [group.curve(name) for group in groups] for name, *_ in _PANELS}
    panels = [panel for panel in _PANELS if any(len(at) for at, *_ in curves[panel[0]])]
    longest = max(run.tokens for group in groups for run in group.runs)
    window = longest / _WINDOWS
    smoothing = f"running mean over {_short(window)} tokens"
    rows = -(-len(panels) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4 * rows + 0.5), layout=_spaced())
        grid = figure.subplots(rows, min(2, len(panels)), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (name, title, label, smooth) in zip(grid.flat, panels):
            for number, (group, curve) in enumerate(zip(groups, curves[name])):
                if len(curve[0]):
                    _draw(axes, group, curve, number, window if smooth else 0.0)
            _fit(axes)
            axes.set_title(f"{title} (smoothed)" if smooth else title)
            axes.set_ylabel(label)
            axes.set_xlabel("training tokens")
            axes.set_xlim(0, longest)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            if name == "no_expert_share":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9)
        several = any(len(group.runs) > 1 for group in groups)
        bands = "; bands: standard deviation over seeds" if several else ""
        figure.supxlabel(f"Smoothed: {smoothing}{bands}.", x=0.01, ha="left", fontsize=8)
        write_picture(figure, path)
    return smoothing


def _spaced() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(hspace=0.04, wspace=0.03)


def _short(tokens: float) -> str:
    """Format a number of tokens, for example as `1.5 M`."""
    unit, sign = next((u for u in _UNITS if tokens >= u[0]), (1.0, ""))
    return f"{tokens / unit:.3g}{sign}"


def _draw(
    axes: Axes,
    group: RunGroup,
    curve: tuple[np.ndarray, np.ndarray, np.ndarray],
    number: int,
    window: float,
) -> None:
    at, mean, spread = curve
    if window and len(at) > 1:
        rows = min(len(at), max(1, round(window / float(np.diff(at).mean()))))
        spread = smoothed(at, spread, rows)[1]
        at, mean = smoothed(at, mean, rows)
    color, line = CYCLE[number % len(CYCLE)], ("-", "--", ":")[number // len(CYCLE) % 3]
    mark = "o" if len(at) <= 30 else ""
    axes.plot(
        at, mean, line, marker=mark, color=color, lw=1.5, ms=3.5, label=group.name,
        clip_on=not mark,
    )  # fmt: skip
    if len(group.runs) > 1:
        axes.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)


def _fit(axes: Axes) -> None:
    """Fit the vertical axis to the curves without their first twentieth."""
    drawn = [np.asarray(line.get_data(), dtype=float) for line in axes.lines]
    values = np.concatenate([mean[at > 0.05 * at[-1]] for at, mean in drawn])
    if len(values) < 3 or np.ptp(values) == 0:
        return
    margin = 0.06 * float(np.ptp(values))
    axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
