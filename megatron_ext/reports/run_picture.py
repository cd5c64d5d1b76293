"""Picture of a run: loss, routing over steps, loads, fan-out, and a text colored by fan-out."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ext.inspection.routed_text import RoutedText, draw_text, lines_of
from megatron_ext.inspection.routed_text import height as text_height
from megatron_ext.reports.plotting import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    VERMILION,
    nothing_yet,
    smoothed,
    write_picture,
)
from megatron_ext.reports.run_metrics import Floats, RunMetrics

_MAX_LAYERS = 3  # number of panels with thresholds
_MAX_EXPERTS = 3  # number of curves in each of these panels


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
    lines = lines_of(text) if text else []
    heights = [3.1, 2.5, 2.5] if metrics.layers else [3.1]
    heights += [text_height(lines)] if text else []
    gap, top, bottom = 0.85, 0.95, 0.55  # inches; a gap has an axis and the next title
    height = sum(heights) + gap * (len(heights) - 1) + top + bottom
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, height))
        figure.text(0.06, 1 - 0.35 / height, title, fontsize=13)
        rows = GridSpec(
            len(heights), 1, figure, height_ratios=heights, hspace=gap / float(np.mean(heights)),
            left=0.06, right=0.98, top=1 - top / height, bottom=bottom / height,
        )  # fmt: skip
        if not metrics.layers:
            _loss(figure.add_subplot(rows[0]), metrics, baselines, final)
        else:
            first, third = (rows[i].subgridspec(1, 2, wspace=0.24) for i in (0, 2))
            _loss(figure.add_subplot(first[0]), metrics, baselines, final)
            _usage(figure.add_subplot(first[1]), metrics)
            _all_thresholds(figure, rows[1], metrics)
            _loads(figure.add_subplot(third[0]), metrics)
            _fan_out(figure.add_subplot(third[1]), metrics)
        if text:
            draw_text(figure.add_subplot(rows[-1]), text, lines)
        write_picture(figure, path)


def draw_panels(metrics: RunMetrics, folder: Path) -> list[Path]:
    """Write the panels on routing as separate pictures, and return their paths.

    Args:
        metrics: Metrics of the run.
        folder: Folder for the pictures; it is created if it does not exist.
    """
    panels = {"usage": _usage, "loads": _loads, "fan_out": _fan_out}
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name in ("thresholds", *panels):
            width = 12 if name == "thresholds" else 7
            figure = Figure(figsize=(width, 3), layout="constrained")
            row = GridSpec(1, 1, figure)[0]
            if name == "thresholds":
                _all_thresholds(figure, row, metrics)
            else:
                panels[name](figure.add_subplot(row), metrics)
            paths.append(folder / f"{name}.png")
            write_picture(figure, paths[-1])
    return paths


def _over_steps(axes: Axes, metrics: RunMetrics) -> None:
    """Set up the axis of steps and shade the warm-up."""
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(metrics.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if end := metrics.warmup_end:
        axes.axvspan(0, end, color="#EFEFEF", lw=0, label="expert-choice warm-up", zorder=0)


def _loss(
    axes: Axes,
    metrics: RunMetrics,
    baselines: Mapping[str, float],
    final: tuple[int, float] | None,
) -> None:
    steps, loss = metrics.series("loss")
    axes.plot(steps, loss, color=BLUE, alpha=0.25, lw=0.8)
    axes.plot(*_smoothed(steps, loss), color=BLUE, lw=1.6, label="training (smoothed)")
    if metrics.evaluations:
        points = list(metrics.evaluations.items())
        axes.plot(
            *zip(*points), "o-", color=VERMILION, lw=1, ms=4.5, label="validation in training",
            clip_on=False, zorder=4,
        )  # fmt: skip
    if final:
        label = f"final validation {final[1]:.3f}"
        axes.plot(*final, "*", color="black", ms=11, label=label, clip_on=False, zorder=5)
    for (name, value), style in zip(baselines.items(), ["--", "-.", ":"] * len(baselines)):
        axes.axhline(value, color=GREY, lw=1.2, ls=style, label=f"{name} {value:.3f}")
    _over_steps(axes, metrics)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss")
    axes.legend(loc="upper right")


def _smoothed(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    return smoothed(steps, values, max(1, len(values) // 40))


def _usage(axes: Axes, metrics: RunMetrics) -> None:
    kinds = {
        "raw_usage": ("raw usage: pairs above threshold", BLUE),
        "saturation": ("saturation: of those, dropped", VERMILION),
        "starvation": ("starvation: of minimum, forced", GREEN),
    }
    highest = peak = 0.0
    for name, (label, color) in kinds.items():
        steps, values = metrics.over_layers(name)
        if not len(steps):
            continue
        smooth = [_smoothed(steps, layer) for layer in values]
        curves = np.array([curve for _, curve in smooth])
        at = smooth[0][0]
        axes.fill_between(at, curves.min(0), curves.max(0), color=color, alpha=0.18, lw=0)
        axes.plot(at, curves.mean(0), color=color, lw=1.6, label=label)
        late = at > (metrics.warmup_end or 0)
        highest = max(highest, float(curves[:, late].max(initial=0.0)))
        peak = max(peak, float(curves.max()))
    if (rate := metrics.target_rate) is not None:
        axes.axhline(rate, color=GREY, lw=1.2, ls="--", label=f"target of raw usage: {rate:.2%}")
    axes.legend(loc="best")
    _over_steps(axes, metrics)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # Usage is far higher in the first steps, when thresholds still follow the logits.
    top = min(min(peak, highest or peak) * 1.7 or 1.0, 1.0)
    axes.set_ylim(0, top)
    if peak > top and metrics.warmup_end:
        axes.text(metrics.warmup_end, top, f" ↑ up to {peak:.0%}", va="top", color=BLUE, fontsize=8)
    axes.set_ylabel("share (mean and range over layers)")
    axes.set_title("Usage and capacity")


def _all_thresholds(figure: Figure, row: SubplotSpec, metrics: RunMetrics) -> None:
    layers = [layer for layer in metrics.layers if len(metrics.series("threshold", layer)[0])]
    if not layers:
        return nothing_yet(figure.add_subplot(row), "thresholds")
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(_MAX_LAYERS, len(layers))).round())
    columns = row.subgridspec(1, len(chosen), wspace=0.15)
    for position, index in enumerate(chosen.astype(int)):
        axes = figure.add_subplot(columns[position])
        _thresholds(axes, metrics, layers[index])
        if position == 0:
            axes.set_ylabel("router logit")


def _thresholds(axes: Axes, metrics: RunMetrics, layer: int) -> None:
    threshold_steps, thresholds = metrics.series("experts/threshold", layer)
    cutoff_steps, cutoffs = metrics.series("experts/cutoff", layer)
    # Draw the experts with the lowest, the median and the highest threshold.
    order = np.argsort(thresholds[-1]) if len(thresholds) else np.arange(0)
    places = np.linspace(0, len(order) - 1, min(_MAX_EXPERTS, len(order))).round().astype(int)
    for expert, color in zip(order[places], (VERMILION, ORANGE, GREEN)):
        axes.plot(cutoff_steps, cutoffs[:, expert], color=color, lw=0.8, alpha=0.5)
        axes.plot(
            threshold_steps, thresholds[:, expert], color=color, lw=1.4, label=f"expert {expert}"
        )
    axes.plot(*metrics.series("cutoff", layer), color="black", lw=0.8, alpha=0.35)
    axes.plot(*metrics.series("threshold", layer), color="black", lw=1.8, label="mean")
    axes.legend(loc="best", ncols=2, handlelength=1.4, columnspacing=1.0)
    _over_steps(axes, metrics)
    axes.set_title(f"Layer {layer}: thresholds (bold), cutoffs (thin)", fontsize=10)


def _loads(axes: Axes, metrics: RunMetrics) -> None:
    means = [metrics.recent("experts/load", layer) for layer in metrics.layers]
    if any(mean is None for mean in means):
        return nothing_yet(axes, "loads")
    loads = np.array(means)
    relative = loads / loads.mean(axis=1, keepdims=True).clip(1e-12)  # [layers, experts]
    norm = CenteredNorm(1.0, halfrange=max(0.25, float(np.abs(relative - 1).max())))
    image = axes.imshow(relative, cmap="PuOr_r", norm=norm, aspect="auto")
    if relative.size <= 200:
        for (row, column), value in np.ndenumerate(relative):
            dark = abs(norm(value) - 0.5) > 0.33
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    axes.set_yticks(range(len(metrics.layers)), [str(layer) for layer in metrics.layers])
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title("Load of an expert / mean of its layer (last tenth of steps)")
    assert axes.figure is not None
    axes.figure.colorbar(image, cax=axes.inset_axes((1.015, 0, 0.02, 1)))


def _fan_out(axes: Axes, metrics: RunMetrics) -> None:
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(metrics.layers)))
    shown = 1
    for layer, color in zip(metrics.layers, colors):
        counts = metrics.recent("fan_out_histogram", layer)
        if counts is None:
            return nothing_yet(axes, "fan-out")
        share = counts / counts.sum()
        # The table shows this mean too; it is logged more often than the histogram.
        mean = metrics.recent("fan_out", layer)
        if mean is None:
            mean = (share * np.arange(len(share))).sum()
        shown = max(shown, int(np.flatnonzero(share > 0.001).max(initial=1)))
        label = f"layer {layer}: mean {mean:.2f}"
        axes.plot(np.arange(len(share)), share, "o-", color=color, ms=3.5, lw=1.3, label=label)
    axes.set_xlim(-0.2, shown + 0.3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("routed experts per token (fan-out)")
    axes.set_ylabel("share of tokens")
    axes.set_title("Fan-out (last tenth of steps)")
    if len(metrics.layers) <= 8:
        axes.legend(loc="upper right")
