"""Curves of training: reward and its components, length of responses, entropy and KL."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignment.evaluation.study.study_runs import PolicyStudy, SeedGroup
from alignment.rounding import Floats
from megatron_ext.reports.plotting import Panel, draw_curve

COMPONENT, COMPONENT_HELD_OUT = "component/", "component_held_out/"
_MOST_COMPONENTS = 6
_MOST_POINTS = 120  # of a curve, before it is averaged


# Name of the metric, title and unit. Metrics of gradings begin with "grade/".
_METRICS = (
    ("reward", "Reward in training", "mean of the step"),
    ("length", "Length of responses in training", "tokens"),
    ("grade/length", "Length of responses to held-out prompts", "tokens"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("grade/kl", "KL from the start policy", "nats per response"),
    ("kl_from_reference", "KL from the reference in the loss", "nats per token"),
    ("cut_off", "Responses cut off at the longest length", "share"),
    ("unrewarded", "Responses without a reward", "share"),
)
_SHARES = ("cut_off", "unrewarded")


def training_panels(study: PolicyStudy) -> list[Panel]:
    """Return the panels of the metrics that any run has, without those that are always 0."""
    panels = []
    for name, title, unit in _METRICS:
        curves = [(study.label(group), *_curve(group, name)) for group in study.groups]
        curves = [curve for curve in curves if len(curve[1])]
        if curves and any(np.any(values) for _, _, values in curves):
            panels.append(Panel(title, _drawer(curves, title, unit, name in _SHARES)))
    return [*panels[:1], *_component_panels(study), *panels[1:]]


def _component_panels(study: PolicyStudy) -> list[Panel]:
    """Return the curves of the components of the reward, in one panel for each group."""
    panels = []
    for prefix, where in ((COMPONENT, "training"), (COMPONENT_HELD_OUT, "held-out prompts")):
        for group in study.groups:
            rows = [
                row
                for run in group.runs
                for row in (*run.training.values(), *run.gradings.values())
            ]
            names = sorted({name for row in rows for name in row if name.startswith(prefix)})
            curves = [
                (name.removeprefix(prefix), *_curve(group, name))
                for name in names[:_MOST_COMPONENTS]
            ]
            title = f"Components of the reward, {where}"
            if len(study.groups) > 1:
                title += f": {study.label(group)}"
            if curves:
                panels.append(Panel(title, _drawer(curves, title, "mean", False)))
    return panels


def _curve(group: SeedGroup, name: str) -> tuple[Floats, Floats]:
    """Return steps and means over the seeds that have the metric, `[points]` each."""
    series = [
        run.graded(name) if name.startswith(("grade/", COMPONENT_HELD_OUT)) else run.trained(name)
        for run in group.runs
    ]
    steps = sorted({step for values in series for step in values})
    means = [np.mean([values[step] for values in series if step in values]) for step in steps]
    return np.array(steps, dtype=np.float64), np.array(means, dtype=np.float64)


def _drawer(
    curves: Sequence[tuple[str, Floats, Floats]], title: str, unit: str, share: bool
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for number, (label, steps, values) in enumerate(curves):
            draw_curve(axes, *_averaged(steps, values), number, label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#E5E5E5", lw=0.6)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(loc="best")

    return draw


def _averaged(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return means of neighboring points of a long curve."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    chunks = np.array_split(np.arange(len(steps)), _MOST_POINTS)
    return (
        np.array([steps[chunk].mean() for chunk in chunks]),
        np.array([values[chunk].mean() for chunk in chunks]),
    )
