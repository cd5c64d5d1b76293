"""Table of the metrics by which runs are compared."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_ext.reports.comparison.compared_runs import (
    ComparedRun,
    RunGroup,
    deviation,
    loss_unit,
    tokenizers_differ,
)
from megatron_ext.reports.run_metrics import Floats


class ComparedMetric(NamedTuple):
    """Metric of a row of the table.

    Attributes:
        label: Name and unit of the metric; `{unit}` is replaced by the unit of the losses.
        value: Function from a run to its value, or None if it has none.
        form: Format string of a value.
    """

    label: str
    value: Callable[[ComparedRun], float | None]
    form: str


def final_loss(run: ComparedRun) -> float | None:
    """Return the last validation loss."""
    _, losses = run.validation()
    return float(losses[-1]) if len(losses) else None


def best_loss(run: ComparedRun) -> float | None:
    """Return the lowest finite validation loss."""
    _, losses = run.validation()
    return float(losses[np.isfinite(losses)].min()) if np.isfinite(losses).any() else None


def training_loss(run: ComparedRun) -> float | None:
    """Return the mean training loss over the last tenth of the steps."""
    return float(run.loss_in_unit(run.metrics.recent("loss"), "train"))


def tokens_per_second(run: ComparedRun) -> float | None:
    """Return the median speed of a step, in tokens per second."""
    _, speeds = run.metrics.series("tokens_per_s")
    return float(np.median(speeds)) if len(speeds) else None


def flops(run: ComparedRun) -> float | None:
    """Return the FLOPs of all steps by Megatron's formula."""
    return None if run.work.flops is None else float(run.work.flops.sum())


def device_hours(run: ComparedRun) -> float | None:
    """Return the hours of all devices in training steps, without evaluation and checkpoints."""
    seconds = run.work.device_seconds
    return None if seconds is None else float(seconds.sum()) / 3600


def load_ratio(run: ComparedRun) -> float | None:
    """Return the largest load of an expert over the mean load, averaged over layers."""
    return _mean_over_layers(run, "load_max_over_mean")


def worst_load_ratio(run: ComparedRun) -> float | None:
    """Return the largest load of an expert over the mean load, in the worst layer."""
    ratios = [run.metrics.recent("load_max_over_mean", layer) for layer in run.metrics.layers]
    return max((float(ratio) for ratio in ratios if ratio is not None), default=None)


def dead_experts(run: ComparedRun) -> float | None:
    """Return the mean number of experts without a token, summed over layers."""
    counts = [run.metrics.recent("dead_experts", layer) for layer in run.metrics.layers]
    return float(sum(counts)) if counts and None not in counts else None


def fan_out(run: ComparedRun) -> float | None:
    """Return the mean fan-out, averaged over layers."""
    return _mean_over_layers(run, "fan_out")


def no_expert_percent(run: ComparedRun) -> float | None:
    """Return the percentage of tokens without a routed expert, averaged over layers."""
    share = _mean_over_layers(run, "no_expert_share")
    return None if share is None else 100 * share


def threshold_drift(run: ComparedRun) -> float | None:
    """Return the mean absolute change of thresholds in the last tenth of the tokens, in logits."""
    moves: list[Floats] = []
    for layer in run.metrics.layers:
        steps, thresholds = run.metrics.series("experts/threshold", layer)
        tokens = run.tokens_at(steps)
        before = np.flatnonzero(tokens <= 0.9 * run.tokens)
        if len(before):
            moves.append(np.abs(thresholds[-1] - thresholds[before[-1]]))
    return float(np.mean(moves)) if moves else None


def _mean_over_layers(run: ComparedRun, name: str) -> float | None:
    values = [run.metrics.recent(name, layer) for layer in run.metrics.layers]
    numbers = [float(value) for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


METRICS = (
    ComparedMetric("tokens trained on", lambda run: run.tokens, "{:,.0f}"),
    ComparedMetric("final validation loss, {unit}", final_loss, "{:.4f}"),
    ComparedMetric("best validation loss, {unit}", best_loss, "{:.4f}"),
    ComparedMetric("training loss, last tenth, {unit}", training_loss, "{:.4f}"),
    ComparedMetric("tokens per second, median step", tokens_per_second, "{:,.0f}"),
    ComparedMetric("FLOPs, by Megatron's formula", flops, "{:.3g}"),
    ComparedMetric("device-hours in training steps", device_hours, "{:.3g}"),
    ComparedMetric("busiest expert's load / mean, mean of layers", load_ratio, "{:.3f}"),
    ComparedMetric("busiest expert's load / mean, worst layer", worst_load_ratio, "{:.3f}"),
    ComparedMetric("experts without a token, all layers", dead_experts, "{:.2f}"),
    ComparedMetric("routed experts per token (fan-out)", fan_out, "{:.3f}"),
    ComparedMetric("tokens without a routed expert, %", no_expert_percent, "{:.2f}"),
    ComparedMetric("threshold drift, logits", threshold_drift, "{:.4f}"),
)
NOTES = (
    "Loads, fan-out and training loss are means over the last tenth of a run's steps.",
    "Threshold drift is how far an expert's threshold moved in the last tenth of the tokens, "
    "without its sign, mean over experts and layers.",
    "Several seeds are shown as mean ± sample standard deviation.",
    "A step that a resumed run repeated counts once, with its last values.",
)


def cells(metric: ComparedMetric, groups: Sequence[RunGroup]) -> list[str]:
    """Return the value of each group as text; empty if a run of the group has none."""
    row = []
    for group in groups:
        numbers = [value for run in group.runs if (value := metric.value(run)) is not None]
        if len(numbers) < len(group.runs):
            row.append("")
            continue
        values = np.array(numbers, dtype=float)
        cell = metric.form.format(values.mean())
        if len(values) > 1 and np.isfinite(values).all():
            spread = float(deviation(values))
            rounding = 1e-9 * abs(values.mean())  # tolerance for equal values
            cell += " ± " + metric.form.format(spread if spread > rounding else 0.0)
        row.append(cell)
    return row


def metrics_table(groups: Sequence[RunGroup]) -> list[list[str]]:
    """Return rows of a label and a cell per group, without rows that are empty."""
    unit = loss_unit([run for group in groups for run in group.runs])
    rows = [
        [metric.label.format(unit=unit), *cells(metric, groups)]
        for metric in [*METRICS, *_at_equal(groups)]
    ]
    return [row for row in rows if any(row[1:])]


def _at_equal(groups: Sequence[RunGroup]) -> list[ComparedMetric]:
    """Return the row of the validation loss at the last tokens at which all runs evaluated.

    Runs that all end there, or have no evaluation in common, need no such row.
    """
    runs = [run for group in groups for run in group.runs]
    if tokenizers_differ(runs):  # equal numbers of tokens are different amounts of text
        return []
    evaluated = [run.validation() for run in runs]
    common = set.intersection(*(set(tokens.round()) for tokens, _ in evaluated))
    if not common or all(tokens[-1].round() == max(common) for tokens, _ in evaluated):
        return []
    common_tokens = max(common)

    def loss(run: ComparedRun) -> float:
        tokens, losses = run.validation()
        return float(losses[tokens.round() == common_tokens][0])

    return [
        ComparedMetric(
            f"validation loss at {common_tokens:,.0f} tokens, all have it", loss, "{:.4f}"
        )
    ]
