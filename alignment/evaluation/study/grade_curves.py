"""Curves of the grades of held-out prompts over steps, a panel for each group of runs."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.evaluation.study.seed_summary import SeedMean, curve
from alignment.evaluation.study.study_runs import GOLD, PROXY, SECOND, PolicyStudy, SeedGroup
from alignment.rounding import SINGLE
from megatron_ext.reports.plotting import BLUE, GREEN, GREY, VERMILION

MOST_COLUMNS = 3
# Label, color, line style, marker and width of each grade. Grades that coincide stay legible: later
# ones are drawn below earlier ones, and are wider.
GRADES: dict[str, tuple[str, str, Any, str, float]] = {
    PROXY: ("proxy: the judge trained against", BLUE, "-", "o", 1.6),
    GOLD: ("gold", VERMILION, (0, (5, 2)), "s", 2.6),
    SECOND: ("second gold", GREEN, (0, (1, 1)), "^", 4.2),
}


def draw_grades(study: PolicyStudy) -> Figure | None:
    """Draw one panel per group: one row per policy, or several rows of judges of one policy."""
    names = [name for name in GRADES if study.has(name)]
    if not names:
        return None
    several = len(study.policies) > 1
    columns = len(study.judges) if several else min(MOST_COLUMNS, len(study.groups))
    rows = len(study.policies) if several else -(-len(study.groups) // columns)
    figure = Figure(figsize=(max(6.0, 3.9 * columns), 3.0 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_axis_off()
    limits = score_range(study, names)
    for number, group in enumerate(study.groups):
        place = divmod(number, columns)
        if several:
            place = study.policies.index(group.policy), study.judges.index(group.judge)
        axes = grid[place]
        axes.set_axis_on()
        _group(axes, group, names)
        axes.set_title(_panel_title(study, group), fontsize=10)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
        if place[1] == 0:
            axes.set_ylabel(f"{_measures(study)}, held-out prompts")
    figure.axes[0].set_ylim(limits)
    handles = _legend_handles(figure.axes[0], study, names)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)))
    return figure


def grade_panel(
    study: PolicyStudy,
    group: SeedGroup,
    names: Sequence[str],
    limits: tuple[float, float],
    axes: Axes,
) -> None:
    """Draw the grades of a group, with a legend, as a separate picture."""
    _group(axes, group, names)
    axes.set_title(_panel_title(study, group), fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{_measures(study)}, held-out prompts")
    axes.set_ylim(limits)
    assert axes.figure is not None
    handles = _legend_handles(axes, study, names)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _panel_title(study: PolicyStudy, group: SeedGroup) -> str:
    name = short_name(group.judge, 30)
    if len(study.policies) > 1:
        name = f"{short_name(group.judge, 16)} on {short_name(group.policy, 12)}"
    return f"{name}, n = {len(group.graded)}"


def _measures(study: PolicyStudy) -> str:
    return " or ".join(sorted({run.measure for run in study.runs if run.gradings}))


def _legend_handles(axes: Axes, study: PolicyStudy, names: Sequence[str]) -> list[Any]:
    handles: list[Any] = []
    for label, color, line, marker, width in (GRADES[name] for name in names):
        handles += axes.plot([], [], color=color, ls=line, lw=width, marker=marker, ms=4,
                             label=label)  # fmt: skip
    if any(run.alarms for run in study.runs):
        handles += axes.plot([], [], "x", color="black", ms=6, mew=1.6,
                             label="first alarm of a run")  # fmt: skip
    return handles


def score_range(study: PolicyStudy, names: Sequence[str]) -> tuple[float, float]:
    """Return the range of the vertical axis, by the curves of single seeds.

    The intervals are ignored, because with two or three seeds they may be much wider.
    """
    values = [v for run in study.runs for name in names for v in run.graded(name).values()]
    low, high = min(values, default=0.0), max(values, default=9.0)
    margin = max(0.25, 0.12 * (high - low))
    return low - margin, high + margin


def _group(axes: Axes, group: SeedGroup, names: Sequence[str]) -> None:
    for name in reversed(names):
        style = GRADES[name][1:]
        color = style[0]
        steps, means = curve(group, name)
        if not steps:
            continue
        for run in group.graded:
            series = run.graded(name)
            if len(group.graded) > 1:
                axes.plot(list(series), list(series.values()), color=color, lw=0.7, alpha=0.45)
            if name == GOLD and run.alarms and (step := run.alarms[0]) in series:
                axes.plot(step, series[step], "x", color="black", ms=6, mew=1.6, zorder=5)
        _mean_curve(axes, steps, means, style, len(group.graded))
        if name == PROXY:
            _annotate_fewer(axes, steps, means)
    if equal := _coinciding(group, names):
        axes.text(0.02, 0.02, equal, transform=axes.transAxes, fontsize=7.5, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)


def _coinciding(group: SeedGroup, names: Sequence[str]) -> str:
    """Return a note on grades that are equal, within rounding, wherever a run has both."""
    notes = []
    for number, name in enumerate(names):
        for other in names[:number]:
            pairs = [
                (values[step], others[step])
                for run in group.graded
                for values, others in [(run.graded(name), run.graded(other))]
                for step in values.keys() & others.keys()
            ]
            if pairs and all(abs(a - b) <= SINGLE * max(abs(a), abs(b)) for a, b in pairs):
                labels = [GRADES[grade][0].partition(":")[0] for grade in (name, other)]
                notes.append(f"{labels[0]} = {labels[1]}")
    return "; ".join(notes)


def _mean_curve(
    axes: Axes,
    steps: Sequence[int],
    means: Sequence[SeedMean],
    style: tuple[str, Any, str, float],
    seeds: int,
) -> None:
    """Draw the mean with its interval: bold where it includes all seeds, faint elsewhere."""
    color, line, marker, width = style
    positions, values = np.array(steps), np.array([mean.value for mean in means], dtype=float)
    full = np.array([mean.n == seeds for mean in means])
    axes.plot(positions, np.where(full, values, np.nan), color=color, lw=width, ls=line)
    if not full.all():
        axes.plot(positions, values, color=color, lw=width / 2, ls=line, alpha=0.5)
    size = 3.0 + 1.2 * (width - 1.6)
    axes.plot(
        positions, values, marker, color=color, ms=size, markevery=max(1, len(positions) // 15)
    )
    low, high = (
        np.array([getattr(mean, end) for mean in means], dtype=float) for end in ("low", "high")
    )
    axes.fill_between(positions, low, high, color=color, alpha=0.15, lw=0)


def _annotate_fewer(axes: Axes, steps: Sequence[int], means: Sequence[SeedMean]) -> None:
    """Annotate the steps at which runs have ended with the number of remaining seeds."""
    for step, before, mean in zip(steps[1:], means, means[1:]):
        if mean.n < before.n and mean.value is not None:
            axes.annotate(f"n = {mean.n}", (step, mean.value), (0, 7), textcoords="offset points",
                          ha="center", fontsize=7.5, color=GREY)  # fmt: skip


def short_name(name: str, width: int = 34) -> str:
    """Return a name that fits into a number of characters."""
    return (
        textwrap.shorten(name, width, placeholder="…")
        if " " in name
        else (name if len(name) <= width else name[: width - 1] + "…")
    )
