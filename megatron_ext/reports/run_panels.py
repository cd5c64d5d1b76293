"""Panels of a run's picture: loss, usage, thresholds, loads and fan-out.

A panel whose metrics are not in the log, such as thresholds before they exist, is left out.
"""

from collections.abc import Mapping
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ext.reports.plotting import (
    BLUE,
    GREEN,
    GREY,
    LINES,
    MARKERS,
    ORANGE,
    VERMILION,
    Panel,
    smoothed,
)
from megatron_ext.reports.run_metrics import Floats, RunMetrics

_MAX_LAYERS = 3  # number of panels with thresholds
_MAX_EXPERTS = 3  # number of curves in each of these panels
_SHORT = 30  # number of steps up to which single steps are marked


def run_panels(
    metrics: RunMetrics, baselines: Mapping[str, float], final: tuple[int, float] | None = None
) -> list[Panel]:
    """Return the panels whose metrics the log has.

    Args:
        metrics: Metrics of the run.
        baselines: Losses to compare with by name, in nats per token.
        final: Step and loss of an evaluation after training.
    """
    panels = [Panel("losses over steps", partial(_loss, metrics, baselines, final), "loss")]
    return panels + routing_panels(metrics)


def routing_panels(metrics: RunMetrics) -> list[Panel]:
    """Return the panels on routing whose metrics the log has."""
    panels = []
    if any(len(metrics.over_layers(name)[0]) for name in _USAGE):
        panels.append(Panel("usage and capacity over steps", partial(_usage, metrics), "usage"))
    layers = [layer for layer in metrics.layers if len(metrics.series("threshold", layer)[0])]
    if layers:
        chosen = np.unique(np.linspace(0, len(layers) - 1, min(_MAX_LAYERS, len(layers))).round())
        for index in chosen.astype(int):
            text = f"thresholds and cutoffs of layer {layers[index]} over steps"
            draw = partial(_thresholds, metrics, layers[index])
            panels.append(Panel(text, draw, "thresholds"))
    drawers = {
        "loads": ("experts/load", "load of each expert", _loads),
        "fan_out": ("fan_out_histogram", "share of tokens by fan-out", _fan_out),
    }
    for name, (figure, description, function) in drawers.items():
        is_recorded = [metrics.recent(figure, layer) is not None for layer in metrics.layers]
        if is_recorded and all(is_recorded):
            panels.append(Panel(description, partial(function, metrics), name))
    return panels


def _over_steps(axes: Axes, metrics: RunMetrics) -> None:
    """Set up the axis of steps and shade the warm-up."""
    axes.set_xlabel("optimizer step")
    first, last = int(metrics.training[0]["step"]), metrics.last_step
    short = last - first < _SHORT
    low, high = (first - 0.5, last + 0.5) if short else (0.0, float(last))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if end := metrics.warmup_end:
        # The last step of the warm-up belongs to it.
        edge = end + 0.5 if short else end
        axes.axvspan(low, edge, color="#EFEFEF", lw=0, label="expert-choice warm-up", zorder=0)


def _mark(values: Floats) -> str:
    """Return the marker of a curve: points are marked if they are few."""
    return "o" if len(values) <= _SHORT else ""


def _loss(
    metrics: RunMetrics,
    baselines: Mapping[str, float],
    final: tuple[int, float] | None,
    axes: Axes,
) -> None:
    steps, loss = metrics.series("loss")
    smooth_steps, smooth = _smoothed(steps, loss)
    if len(smooth_steps) < len(steps):
        axes.plot(steps, loss, color=BLUE, alpha=0.25, lw=0.8)
    label = "training (smoothed)" if len(smooth_steps) < len(steps) else "training"
    axes.plot(
        smooth_steps, smooth, color=BLUE, lw=1.6, marker=_mark(smooth_steps), ms=3.5, label=label
    )
    if metrics.evaluations:
        points = list(metrics.evaluations.items())
        axes.plot(
            *zip(*points), "s--", color=VERMILION, lw=1, ms=4.5, label="validation in training",
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


_USAGE = {
    "raw_usage": ("raw usage: pairs above threshold", BLUE, "-", 1.6),
    "saturation": ("saturation: of those, dropped", VERMILION, (0, (5, 2)), 1.6),
    "starvation": ("starvation: of minimum, forced", GREEN, (0, (1, 1.2)), 2.4),
}


def _usage(metrics: RunMetrics, axes: Axes) -> None:
    highest = peak = 0.0
    for name, (label, color, line, width) in _USAGE.items():
        steps, values = metrics.over_layers(name)
        if not len(steps):
            continue
        smooth = [_smoothed(steps, layer) for layer in values]
        curves = np.array([curve for _, curve in smooth])
        smooth_steps = smooth[0][0]
        axes.fill_between(smooth_steps, curves.min(0), curves.max(0), color=color, alpha=0.18, lw=0)
        axes.plot(smooth_steps, curves.mean(0), color=color, lw=width, ls=line,
                  marker=_mark(smooth_steps), ms=3, label=label)  # fmt: skip
        late = smooth_steps > (metrics.warmup_end or 0)
        highest = max(highest, float(curves[:, late].max(initial=0.0)))
        peak = max(peak, float(curves.max()))
    if (rate := metrics.target_rate) is not None:
        axes.axhline(rate, color=GREY, lw=1.2, ls="--", label=f"target of raw usage: {rate:.2%}")
    axes.legend(loc="best")
    _over_steps(axes, metrics)
    # Usage is far higher in the first steps, when thresholds still follow the logits.
    top = min(min(peak, highest or peak) * 1.7 or 1.0, 1.0)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.1 else None))
    if peak > top and metrics.warmup_end:
        axes.text(metrics.warmup_end, top, f" ↑ up to {peak:.0%}", va="top", color=BLUE, fontsize=8)
    axes.set_ylabel("share (mean and range over layers)")
    axes.set_title("Usage and capacity")


def _thresholds(metrics: RunMetrics, layer: int, axes: Axes) -> None:
    threshold_steps, thresholds = metrics.series("experts/threshold", layer)
    cutoff_steps, cutoffs = metrics.series("experts/cutoff", layer)
    # Draw the experts with the lowest, the median and the highest threshold.
    order = np.argsort(thresholds[-1]) if len(thresholds) else np.arange(0)
    places = np.linspace(0, len(order) - 1, min(_MAX_EXPERTS, len(order))).round().astype(int)
    for expert, color in zip(order[places], (VERMILION, ORANGE, GREEN)):
        axes.plot(cutoff_steps, cutoffs[:, expert], color=color, lw=0.8, alpha=0.5)
        axes.plot(
            threshold_steps, thresholds[:, expert], color=color, lw=1.4,
            marker=_mark(threshold_steps), ms=3, label=f"expert {expert}",
        )  # fmt: skip
    axes.plot(*metrics.series("cutoff", layer), color="black", lw=0.8, alpha=0.35)
    steps, means = metrics.series("threshold", layer)
    axes.plot(steps, means, color="black", lw=1.8, marker=_mark(means), ms=3, label="mean")
    axes.legend(loc="best", ncols=2, handlelength=1.4, columnspacing=1.0)
    axes.set_ylabel("router logit")
    _over_steps(axes, metrics)
    axes.set_title(f"Layer {layer}: thresholds (bold), cutoffs (thin)", fontsize=10)


def _loads(metrics: RunMetrics, axes: Axes) -> None:
    loads = np.array([metrics.recent("experts/load", layer) for layer in metrics.layers])
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
    axes.set_title("Load of an expert / mean of its layer (end)")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)


def _fan_out(metrics: RunMetrics, axes: Axes) -> None:
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(metrics.layers)))
    counts = [metrics.recent("fan_out_histogram", layer) for layer in metrics.layers]
    shares = [of_layer / of_layer.sum() for of_layer in counts]
    largest = max(int(np.flatnonzero(share > 0.001).max(initial=1)) for share in shares)
    for number, (layer, share, color) in enumerate(zip(metrics.layers, shares, colors)):
        # The table shows this mean too; it is logged more often than the histogram.
        mean = metrics.recent("fan_out", layer)
        if mean is None:
            mean = (share * np.arange(len(share))).sum()
        label = f"layer {layer}: mean {mean:.2f}"
        axes.plot(
            np.arange(largest + 1), share[: largest + 1], color=color, label=label,
            ls=LINES[number % len(LINES)], marker=MARKERS[number % len(MARKERS)], ms=3.5,
            lw=max(1.2, 2.2 - 0.3 * number), clip_on=False,
        )  # fmt: skip
    axes.set_xlim(-0.2, largest + 0.3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("routed experts per token (fan-out)")
    axes.set_ylabel("share of tokens")
    axes.set_title("Fan-out (end)")
    if len(metrics.layers) <= 8:
        axes.legend(loc="upper right")
