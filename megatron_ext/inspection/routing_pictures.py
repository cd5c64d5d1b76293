"""Pictures of the routing statistics, one PNG each."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megatron_ext.inspection.routing_statistics import FORMULAS
from megatron_ext.moe.registry import router_type
from megatron_ext.reports.plotting import BLUE, STYLE, VERMILION, write_picture

_CELLS_WITH_NUMBERS = 400  # with more cells, numbers are too small to read


def draw_pictures(statistics: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the pictures and return their captions by name.

    Args:
        statistics: Statistics that `routing_statistics` returns.
        folder: Existing folder for the pictures.
    """
    matplotlib.use("agg")
    pictures = {
        "domains": (_domains, f"Experts by domain. {FORMULAS['share']}."),
        "specialisation": (
            _specialisation,
            f"Specialization. Left: {FORMULAS['nmi']}. Independent pairs: "
            f"{FORMULAS['nmi_by_chance']}. Right: {FORMULAS['expert_specialisation']}.",
        ),
        "margins": (_margins, f"Margins. {FORMULAS['margin']}."),
        "fan_out_by_loss": (
            _fan_out_by_loss,
            f"Compute and loss. {FORMULAS['fan_out_by_loss']}.",
        ),
        "coactivation": (_coactivation, f"Co-activation. {FORMULAS['coactivation']}."),
    }
    if len(statistics["domains"]) == 1:
        del pictures["specialisation"]
    with matplotlib.rc_context(STYLE):
        for name, (draw, _) in pictures.items():
            write_picture(draw(statistics), folder / f"{name}.png", dpi=110)
    return {name: caption for name, (_, caption) in pictures.items()}


def _grid(panels: int, width: float, height: float, most: int = 4) -> tuple[Figure, Iterator[Axes]]:
    """Return a figure and its panels, at most `most` in a row, with sizes in inches."""
    columns = min(panels, most)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, iter(axes[:panels])


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes NaN


def _heat(axes: Axes, values: np.ndarray, norm: Normalize, colors: str, form: str = "") -> None:
    """Draw a matrix as colored cells, with numbers if it is small and `form` is not empty."""
    image = axes.imshow(values, cmap=colors, norm=norm, aspect="auto")
    axes.set_facecolor("#DDDDDD")  # color of undefined cells
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if not form or values.size > _CELLS_WITH_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                column, row, form.format(value), ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip


def _layer_ticks(axes: Axes, layers: list[int]) -> None:
    ticks = range(0, len(layers), -(-len(layers) // 12))
    axes.set_yticks(list(ticks), [str(layers[i]) for i in ticks])
    axes.set_ylabel("layer")


def _domains(statistics: dict[str, Any]) -> Figure:
    layers, domains = statistics["layers"], statistics["domains"]
    shares = {name: _array(domain["share"]) for name, domain in domains.items()}  # [L, E]
    most = max(float(share.max()) for share in shares.values()) or 1.0
    height = 1.5 + 0.28 * min(len(layers), 20)
    figure, panels = _grid(
        len(domains), 1.4 + 0.34 * min(statistics["experts"], 16), height, most=3
    )
    for axes, (name, share) in zip(panels, shares.items()):
        _heat(axes, 100 * share, Normalize(0, 100 * most), "viridis", "{:.0f}")
        _layer_ticks(axes, layers)
        axes.set_xlabel("expert")
        axes.set_title(f"{name} ({domains[name]['tokens']:,} tokens)")
    figure.colorbar(
        ScalarMappable(Normalize(0, most), "viridis"),
        ax=figure.axes,
        format=PercentFormatter(1.0, decimals=0),
        label="share of the domain's tokens\nthat the expert takes",
    )
    return figure


def _specialisation(statistics: dict[str, Any]) -> Figure:
    layers = statistics["layers"]
    figure = Figure(figsize=(11, 1.9 + 0.28 * min(len(layers), 20)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    measures = statistics["specialisation"]
    nmi, chance = _array(measures["nmi"]), _array(measures["nmi_by_chance"])
    positions = np.arange(len(layers))
    left.barh(positions, nmi, color=BLUE, height=0.65)
    left.plot(chance, positions, "|", color=VERMILION, ms=11, mew=2, clip_on=False)
    _layer_ticks(left, layers)
    left.set_ylim(len(layers) - 0.4, -0.6)
    left.set_xlim(left=0)
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.set_xlabel("normalized mutual information (red: independent pairs)")
    left.set_title("Domain and expert")
    scores = _array(measures["experts"])  # [L, E]
    norm = Normalize(0, max(0.05, float(np.nanmax(scores, initial=0.0))))
    _heat(right, scores, norm, "viridis", "{:.2f}")
    _layer_ticks(right, layers)
    right.set_xlabel("expert")
    right.set_title("Experts")
    figure.colorbar(
        ScalarMappable(norm, "viridis"), ax=right, label="1 − H(domain | expert) / log D"
    )
    return figure


def _margins(statistics: dict[str, Any]) -> Figure:
    figure, panels = _grid(len(statistics["layers"]), 3.6, 2.7)
    unit = router_type(statistics["router"]).margin_unit
    for axes, layer, margins in zip(panels, statistics["layers"], statistics["margins"]):
        counts = _array(margins["counts"])
        edges = np.linspace(-margins["limit"], margins["limit"], len(counts) + 1)
        pairs = counts.sum() + margins["below"] + margins["above"]
        density = counts / max(pairs, 1) / (edges[1] - edges[0])
        above_threshold = edges[:-1] >= -1e-12
        axes.stairs(
            density[~above_threshold],
            edges[: np.count_nonzero(~above_threshold) + 1],
            fill=True,
            color="#CCC",
        )
        selected = edges[np.count_nonzero(~above_threshold) :]
        axes.stairs(density[above_threshold], selected, fill=True, color=BLUE)
        axes.axvline(0, color="black", lw=0.8)
        share = (counts[above_threshold].sum() + margins["above"]) / max(pairs, 1)
        axes.set_title(f"Layer {layer}: {share:.1%} of the pairs routed")
        used = np.flatnonzero(counts)
        if len(used):
            axes.set_xlim(edges[used[0]], edges[used[-1] + 1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"margin ({unit})")
        axes.set_ylabel("density of pairs")
    return figure


def _fan_out_by_loss(statistics: dict[str, Any]) -> Figure:
    by_loss, layers = statistics["fan_out_by_loss"], statistics["layers"]
    edges = by_loss["edges"]
    labels = [
        f"{low:g}–{high:g}" if high is not None else f"{low:g} and more"
        for low, high in pairwise(edges)
    ]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    titles = {"next": "By the loss of the token predicted here", "own": "By the token's own loss"}
    positions = np.arange(len(labels))
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(layers)))
    for (above, below), (kind, title) in zip(panels.T, titles.items()):
        buckets = by_loss[kind]
        mean, error = _array(buckets["mean"]), _array(buckets["standard_error"])
        for layer, color, y in zip(layers, colors, mean):
            above.plot(positions, y, color=color, lw=0.9, label=f"layer {layer}")
        above.errorbar(
            positions, mean[-1], error[-1], fmt="o-", color="black", ms=3.5, lw=1.6, capsize=3,
            label="mean of the layers ± standard error",
        )  # fmt: skip
        above.set_title(title)
        tokens = _array(buckets["tokens"])
        below.bar(positions, tokens, color="#BBBBBB", width=0.8)
        for x, count in zip(positions, tokens):
            below.text(x, count, f"{count:,.0f}", ha="center", va="bottom", fontsize=7)
        below.set_ylim(0, max(1.0, tokens.max()) * 1.25)
        below.set_xticks(positions, labels, rotation=35, ha="right")
        below.set_xlabel("loss (nats)")
    panels[0, 0].set_ylabel("routed experts per token (fan-out)")
    panels[1, 0].set_ylabel("tokens")
    panels[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(layers) <= 8:
        panels[0, 1].legend(loc="best", ncols=2)
    return figure


def _coactivation(statistics: dict[str, Any]) -> Figure:
    ratios = _array(statistics["coactivation"]["observed_over_expected"])  # [L, E, E]
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    reach = max(2.0, float(np.exp(np.abs(np.log(positive)).max(initial=0.0))))
    norm = LogNorm(1 / min(reach, 16.0), min(reach, 16.0), clip=True)
    size = 1.3 + 0.26 * min(statistics["experts"], 12)
    figure, panels = _grid(len(ratios), size, size)
    for axes, layer, ratio in zip(panels, statistics["layers"], ratios):
        _heat(axes, ratio, norm, "PuOr_r", "{:.1f}" if statistics["experts"] <= 12 else "")
        axes.set_aspect("equal")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("expert")
        axes.set_ylabel("expert")
        axes.set_title(f"Layer {layer}")
    bar = figure.colorbar(
        ScalarMappable(norm, "PuOr_r"),
        ax=figure.axes,
        label="shared tokens / expected if independent",
    )
    ticks = [
        tick for tick in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16) if 1 / reach <= tick <= reach
    ]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure
