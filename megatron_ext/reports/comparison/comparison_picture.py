"""Picture of the metrics of runs against training tokens."""

from collections.abc import Callable, Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_ext.reports.comparison.compared_runs import RunGroup, loss_unit
from megatron_ext.reports.plotting import (
    CYCLE,
    STYLE,
    draw_curve,
    figure_png,
    panel_png,
    smoothed,
)
from megatron_ext.reports.run_metrics import Floats

Curve = tuple[Floats, Floats, Floats]  # tokens, mean and standard deviation, `[n]` each
_WINDOWS = 50  # number of smoothing windows in the longest run
_UNITS = ((1e9, " B"), (1e6, " M"), (1e3, " k"))
_PANELS = (
    ("loss", "Training loss", "loss ({unit})", True),
    ("val_loss", "Validation loss", "loss ({unit})", False),
    ("threshold", "Thresholds, mean of all experts", "router logit", False),
    ("load_max_over_mean", "Load, mean of layers", "busiest expert / mean load", True),
    ("fan_out", "Fan-out, mean of layers", "routed experts per token", True),
    ("no_expert_share", "Tokens without a routed expert", "share, mean of layers", True),
)


def draw_comparison(groups: Sequence[RunGroup]) -> tuple[bytes, str, list[tuple[bytes, str]]]:
    """Draw the picture of a comparison, without the panels that no run has.

    Returns:
        The picture as a PNG, the description of the smoothing, and each panel as a PNG with its
        title.
    """
    matplotlib.use("agg")
    longest = max(run.tokens for group in groups for run in group.runs)
    window = longest / _WINDOWS
    drawers = _drawers(groups, longest, window)
    smoothing = f"running mean over {_short(window)} tokens"
    rows = -(-len(drawers) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4 * rows + 0.5), layout=_spaced())
        grid = figure.subplots(rows, min(2, len(drawers)), squeeze=False)
        for axes in grid.flat[len(drawers) :]:
            axes.set_axis_off()
        for axes, draw in zip(grid.flat, drawers.values()):
            draw(axes)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        columns = max(1, min(4, 150 // (8 + max(map(len, labels)))))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9)
        has_seeds = any(len(group.runs) > 1 for group in groups)
        bands = "; bands: standard deviation over seeds" if has_seeds else ""
        figure.supxlabel(f"Smoothed: {smoothing}{bands}.", x=0.01, ha="left", fontsize=8)
        picture = figure_png(figure, 130)
        panels = [(panel_png(_with_legend(draw)), title) for title, draw in drawers.items()]
    return picture, smoothing, panels


def _drawers(
    groups: Sequence[RunGroup], longest: float, window: float
) -> dict[str, Callable[[Axes], None]]:
    """Return the function that draws each panel for which a run has data, by title."""
    drawers: dict[str, Callable[[Axes], None]] = {}
    unit = loss_unit([run for group in groups for run in group.runs])
    for name, title, label, smooth in _PANELS:
        curves = [group.curve(name) for group in groups]
        if any(len(tokens) for tokens, *_ in curves):
            heading = f"{title} (smoothed)" if smooth else title
            drawers[heading] = partial(
                _panel, groups, curves, name, (heading, label.format(unit=unit)), longest,
                window if smooth else 0.0,
            )  # fmt: skip
    return drawers


def _panel(
    groups: Sequence[RunGroup],
    curves: Sequence[Curve],
    name: str,
    labels: tuple[str, str],
    longest: float,
    window: float,
    axes: Axes,
) -> None:
    for number, (group, curve) in enumerate(zip(groups, curves)):
        if len(curve[0]):
            _draw(axes, group, curve, number, window)
        else:  # for the legend of all panels
            draw_curve(axes, curve[0], curve[1], number, group.name, clip_on=True)
    _fit(axes)
    axes.set_title(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_xlabel("training tokens")
    axes.set_xlim(0, 1.01 * longest)  # room for the last marker
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if name == "no_expert_share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _with_legend(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
    def draw_with_legend(axes: Axes) -> None:
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        columns = 1 if max(map(len, labels)) > 34 else 2
        assert axes.figure is not None
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)

    return draw_with_legend


def _spaced() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(hspace=0.04, wspace=0.03)


def _short(tokens: float) -> str:
    """Format a number of tokens, for example as `1.5 M`."""
    unit, sign = next((u for u in _UNITS if tokens >= u[0]), (1.0, ""))
    return f"{tokens / unit:.3g}{sign}"


def _draw(axes: Axes, group: RunGroup, curve: Curve, number: int, window: float) -> None:
    tokens, mean, spread = curve
    if window and len(tokens) > 1:
        rows = min(len(tokens), max(1, round(window / float(np.diff(tokens).mean()))))
        spread = smoothed(tokens, spread, rows)[1]
        tokens, mean = smoothed(tokens, mean, rows)
    draw_curve(axes, tokens, mean, number, group.name, clip_on=True)
    if len(group.runs) > 1:
        color = CYCLE[number % len(CYCLE)]
        axes.fill_between(tokens, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)


def _fit(axes: Axes) -> None:
    """Fit the vertical axis to the curves without their first twentieth."""
    points = [np.asarray(line.get_data(), dtype=float) for line in axes.lines]
    values = np.concatenate(
        [mean[tokens > 0.05 * tokens[-1]] for tokens, mean in points if len(tokens)]
    )
    values = values[np.isfinite(values)]
    if len(values) < 3 or np.ptp(values) == 0:
        return
    margin = 0.06 * float(np.ptp(values))
    axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
