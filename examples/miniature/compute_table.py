"""The table of the computation that rows of thresholds spent: fan-out and forced tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_ext.reports.comparison.compared_runs import ComparedRun

WINDOW = 20  # steps over which fan-out is averaged
_SETTLED = 50  # step after which experts should not need forced tokens
_CLOSE = 0.05  # of the target

NOTE = (
    f"Fan-out is the mean number of routed experts per token over the target, of the steps that "
    f"route by thresholds: the lowest and highest mean of {WINDOW} steps and the share of these "
    f"means within {_CLOSE:.0%} of the target, over all seeds and averaged over layers. Forced is "
    f"the share of the experts' minimum load that tokens below the threshold filled after step "
    f"{_SETTLED}: the mean, and the highest mean of {WINDOW} steps. Held-out is the fan-out on "
    "held-out text over the target: the mean of the layers, and the layer furthest from it."
)


def compute_figures(run: ComparedRun, validated: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fan-out and the forced tokens of a run, None without thresholds in training.

    Args:
        run: Run with `settings`.
        validated: Result of `tools.validation_loss` with the model's own routing.

    Returns:
        `windows`, means of fan-out over the target in windows of steps that route by thresholds;
        `forced`, the mean forced share of later steps; `forced_windows`, its means in windows of
        steps; `held_out`, fan-out over the target by layer.
    """
    settings = run.settings
    if settings.get("router_type") != "expert-threshold" or not settings.get("num_experts"):
        return None
    target = settings.get("et_mean_experts") or settings["moe_router_topk"]
    steps, fan_out = run.metrics.over_layers("fan_out")
    first = settings["et_warmup_iters"]
    forced_steps, forced = run.metrics.over_layers("starvation")
    after = forced_steps > max(first, _SETTLED)
    held_out = [layer["fan_out"] / target for layer in validated["layers"].values()]
    return {
        "windows": _windows(fan_out.mean(axis=0)[steps > first] / target),
        "forced": float(forced.mean(axis=0)[after].mean()) if after.any() else 0.0,
        "forced_windows": _windows(forced.mean(axis=0)[after]),
        "held_out": held_out,
    }


def _windows(values: np.ndarray) -> list[float]:
    """Return the means of consecutive windows, of all values if they are fewer than a window."""
    count = len(values) // WINDOW
    if count == 0:
        return [float(values.mean())] if len(values) else []
    return [
        round(float(mean), 5)
        for mean in values[: count * WINDOW].reshape(count, WINDOW).mean(axis=1)
    ]


def compute_table(figures: dict[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Return the lines of the table.

    Args:
        figures: Label of each row with thresholds, and the figures of its seeds.
    """
    heads = ["fan-out: lowest, highest", "within 5 %", "forced: mean, highest"]
    heads += ["held-out: mean, worst"]
    lines = [f"|  | {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for label, seeds in figures.items():
        windows = np.concatenate([seed["windows"] for seed in seeds])
        mean = np.mean([seed["forced"] for seed in seeds])
        highest = max(max(seed["forced_windows"], default=0.0) for seed in seeds)
        held_out = np.concatenate([seed["held_out"] for seed in seeds])
        close = np.abs(windows - 1) <= _CLOSE
        worst = held_out[np.abs(held_out - 1).argmax()]
        lines.append(
            f"| {label} | {windows.min():.2f}, {windows.max():.2f} | "
            f"{close.sum()} of {len(windows)} | {mean:.2%}, {highest:.1%} | "
            f"{held_out.mean():.3f}, {worst:.3f} |"
        )
    return lines
