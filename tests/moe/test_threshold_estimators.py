"""Tests of threshold filters on synthetic drift, against the optimal filter and the best decay.

The references are written in NumPy, in fp64, one expert at a time. As a program, the module prints
the errors; with folders of runs with `--log-interval 1`, those of predictions of their cutoffs.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from megatron_ext.moe import threshold_estimators
from megatron_ext.moe.threshold_estimators import StepCounts
from megatron_ext.moe.thresholds import Thresholds
from megatron_ext.reports.run_metrics import RunMetrics
from tests.distributed import ROOT
from tests.megatron import TINY
from tests.pretraining import train

Floats = NDArray[np.float64]

EXPERTS, TOKENS, RATE, STEPS, FIRST = 8, 2048, 1 / 8, 400, 20
K = int(TOKENS * RATE)
# Place of the cutoff of normal logits, their density there, and the deviation of a cutoff.
CUTOFF, DENSITY = 1.15035, 0.20585
DEVIATION = (RATE * (1 - RATE) / TOKENS) ** 0.5 / DENSITY
DECAYS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def random_walk(variance: float) -> Floats:
    """Return a level whose steps have a variance in units of the cutoff's variance."""
    steps = np.random.default_rng(7).normal(size=(STEPS, EXPERTS))
    return np.cumsum(steps, axis=0) * DEVIATION * variance**0.5


def in_steps(level: Callable[[Floats], Any]) -> Floats:
    return np.repeat(level(np.arange(STEPS, dtype=float))[:, None], EXPERTS, axis=1)


# Means of the logits, `[steps, experts]`.
DRIFTS: dict[str, Floats] = {
    "constant": in_steps(lambda t: 0 * t),
    "linear": in_steps(lambda t: -0.03 * t),
    "step change": in_steps(lambda t: 1.0 * (t >= 200)),
    "seasonal": in_steps(lambda t: np.sin(2 * np.pi * t / 100)),
    "decaying": in_steps(lambda t: 3 * np.exp(-t / 40)),
    "slow walk": random_walk(1 / 100),
    "fast walk": random_walk(1.0),
}


def logits(means: Floats, seed: int, copies: int = 1) -> Iterator[torch.Tensor]:
    """Return the logits of each step, normal around the means, fp32 `[tokens, experts]`.

    With copies, each value is that of several tokens, so that they are not independent.
    """
    generator = torch.Generator().manual_seed(seed)
    for mean in means:
        values = torch.randn(TOKENS // copies, EXPERTS, generator=generator)
        yield values.repeat(copies, 1) + torch.tensor(mean).float()


class Run(NamedTuple):
    """Estimates of a run, with their inputs.

    Attributes:
        estimates: fp64 `[steps - 1, experts]`, before each step but the first.
        cutoffs: fp64 `[steps, experts]`.
        above: fp64 `[steps - 1, experts]`, tokens above the estimates.
        state: The filters at the end.
    """

    estimates: Floats
    cutoffs: Floats
    above: Floats
    state: torch.Tensor


def run(means: Floats, copies: int = 1, seed: int = 1) -> Run:
    thresholds = Thresholds(EXPERTS, 0.0, adaptive=True)
    estimates, cutoffs, aboves = [], [], []
    for values in logits(means, seed, copies):
        cutoff = values.topk(K, dim=0).values[-1]
        counts = None
        if thresholds.update_count:
            estimates.append(thresholds.value().double().numpy())
            above = (values > thresholds.value()).sum(dim=0)
            aboves.append(above.double().numpy())
            counts = StepCounts(above, K, TOKENS)
        thresholds.update(cutoff, counts)
        cutoffs.append(cutoff.double().numpy())
    assert thresholds.filter is not None
    return Run(np.array(estimates), np.array(cutoffs), np.array(aboves), thresholds.filter)


def average(cutoffs: Floats, decay: float) -> Floats:
    """Return the bias-corrected moving average before each step but the first."""
    raw, values = np.zeros(cutoffs.shape[1]), []
    for count, cutoff in enumerate(cutoffs[:-1], start=1):
        raw = decay * raw + (1 - decay) * cutoff
        values.append(raw / (1 - decay**count))
    return np.array(values)


def kalman(cutoffs: Floats, level_variance: float, slope_variance: float) -> Floats:
    """Return the filter of a linear trend with known variances, in units of the measurement's."""
    transition = np.array([[1.0, 1.0], [0.0, 1.0]])
    noise = np.diag([level_variance, slope_variance])
    observe = np.array([1.0, 0.0])
    values = np.empty((len(cutoffs) - 1, cutoffs.shape[1]))
    for expert in range(cutoffs.shape[1]):
        state = np.array([cutoffs[0, expert], 0.0])
        covariance = np.diag([1.0, 1e6 if slope_variance else 0.0])
        for step in range(1, len(cutoffs)):
            state = transition @ state
            covariance = transition @ covariance @ transition.T + noise
            values[step - 1, expert] = state[0]
            gain = covariance @ observe / (observe @ covariance @ observe + 1.0)
            state = state + gain * (cutoffs[step, expert] - state[0])
            covariance = covariance - np.outer(gain, observe @ covariance)
    return values


def error(values: Floats, means: Floats) -> float:
    """Return the root mean square error of estimates, in standard deviations of a cutoff."""
    exact = means[1:] + CUTOFF
    return float(((values - exact)[FIRST:] ** 2).mean() ** 0.5) / DEVIATION


# Variances of the filter that is optimal for a drift; where none is, the best of a grid of them.
KNOWN = {
    "constant": (0.0, 0.0),
    "linear": (0.0, 1e-12),
    "slow walk": (1 / 100, 0.0),
    "fast walk": (1.0, 0.0),
}
GRID = [
    *((0.0, 2.0**power) for power in range(-24, 5, 2)),
    *((2.0**power, 0.0) for power in range(-24, 5, 2)),
]


@cache
def errors(name: str) -> tuple[float, float, float]:
    """Return the errors of the adaptive estimate, the best decay and the optimal filter."""
    means = DRIFTS[name]
    ours = run(means)
    best = min(error(average(ours.cutoffs, decay), means) for decay in DECAYS)
    grid = [KNOWN[name]] if name in KNOWN else GRID
    optimal = min(error(kalman(ours.cutoffs, *variances), means) for variances in grid)
    return error(ours.estimates, means), best, optimal


@pytest.mark.parametrize("name", DRIFTS)
def test_adaptive_estimate_is_nearly_as_good_as_the_filter_that_knows_the_drift(name: str) -> None:
    # A cutoff differs from its estimate by the estimate's error and by its own deviation.
    ours, best, optimal = (np.hypot(1.0, value) for value in errors(name))
    assert ours <= 1.08 * optimal
    assert ours <= 1.02 * best  # of all decays, in hindsight


def test_variance_of_a_cutoff_follows_from_the_counts() -> None:
    bank = threshold_estimators._unpack(run(DRIFTS["slow walk"]).state)
    variance = K * (1 - RATE) * (bank.distance / bank.tokens) ** 2
    assert variance.mean().sqrt().item() == pytest.approx(DEVIATION, rel=0.1)


def test_tokens_that_are_not_independent_are_not_taken_for_drift() -> None:
    # Four tokens share a logit, so a cutoff varies twice as much as that of as many tokens.
    means = DRIFTS["constant"]
    ours = run(means, copies=4)
    independent = error(run(means).estimates, means)
    assert error(ours.estimates, means) < 1.5 * 2 * independent < 0.5
    weight = threshold_estimators._unpack(ours.state).weight
    factors = weight.view(len(threshold_estimators._FACTORS), -1, EXPERTS).sum(dim=1)
    assert (factors[0] < 0.05).all()  # of 1, which had 0.25: independence is unlikely


def bank(data: Run, expert: int) -> Floats:
    """Return the estimates of one expert by filters and factors one at a time, in matrices."""
    pairs = [(level, 0.0) for level in threshold_estimators._LEVEL]
    pairs += [(0.0, slope) for slope in threshold_estimators._SLOPE]
    transition, observe = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([1.0, 0.0])
    first = data.cutoffs[0, expert]
    states = [np.array([first, 0.0]) for _ in pairs]
    covariances = [np.diag([1.0, slope]) for _, slope in pairs]
    models = [(f, i) for f in threshold_estimators._FACTORS for i in range(len(pairs))]
    weights = np.full(len(models), 1 / len(models))
    distance = tokens = 0.0
    values = []
    for step in range(1, len(data.cutoffs)):
        cutoff, surplus = data.cutoffs[step, expert], data.above[step - 1, expert] - K
        states = [transition @ state for state in states]
        covariances = [
            transition @ covariance @ transition.T + np.diag(pair)
            for covariance, pair in zip(covariances, pairs)
        ]
        estimate = sum(w * states[i][0] for w, (_, i) in zip(weights, models))
        values.append(estimate)
        distance, tokens = (
            distance + abs(cutoff - data.estimates[step - 1, expert]),
            tokens + abs(surplus),
        )
        if tokens > threshold_estimators._DENSITY_TOKENS:
            distance, tokens = distance / 2, tokens / 2
        if tokens and distance:
            variance = K * (1 - RATE) * (distance / tokens) ** 2
            spread = [
                (variance * factor * (1 + covariances[i][0, 0])) ** 0.5 for factor, i in models
            ]
            density = norm.pdf([cutoff - states[i][0] for _, i in models], scale=spread)
            weights = weights * density / (weights * density).sum()
            weights = weights * step / (step + 1) + 1 / (step + 1) / len(models)
        for i in range(len(pairs)):
            gain = covariances[i] @ observe / (covariances[i][0, 0] + 1)
            states[i] = states[i] + gain * (cutoff - states[i][0])
            covariances[i] = covariances[i] - np.outer(gain, observe @ covariances[i])
    return np.array(values)


@pytest.mark.parametrize("name", ["decaying", "fast walk"])
def test_filter_bank_equals_its_definition(name: str) -> None:
    data = run(DRIFTS[name][:60])
    for expert in range(EXPERTS):
        difference = np.abs(bank(data, expert) - data.estimates[:, expert]).max()
        assert difference < 1e-3 * DEVIATION, expert


def test_table_of_errors_in_the_documentation_is_this_one() -> None:
    page = (ROOT / "docs/reference/expert-threshold.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = {line[0]: line[1:] for line in lines if line[0] in DRIFTS}
    assert list(table) == list(DRIFTS)
    for name, cells in table.items():
        documented = [float(cell) for cell in cells]
        assert documented == pytest.approx(errors(name), abs=0.03), name


# First and last step of parts of a run, as fractions of it.
PARTS = ((0.02, 0.1), (0.1, 0.3), (0.3, 1.0))


def recorded(run: Path) -> tuple[Floats, Floats]:
    """Return the thresholds and cutoffs of a run with `--log-interval 1`.

    Returns:
        `[steps, layers * experts]` each; the threshold routed the step whose cutoff is next to it.
    """
    metrics = RunMetrics.read(run)
    values = []
    for name in ("threshold", "cutoff"):
        series = [metrics.series(f"experts/{name}", layer) for layer in metrics.layers]
        values.append(np.concatenate([layer for _, layer in series], axis=1))
    return values[0], values[1]


def recorded_errors(thresholds: Floats, cutoffs: Floats) -> dict[str, list[float]]:
    """Return the root mean square errors of predictions of recorded cutoffs, by part of the run.

    Args:
        thresholds: `[steps - 1, experts]`, those that routed each step but the first.
        cutoffs: `[steps, experts]`.
    """
    steps = len(thresholds)
    parts = [slice(int(first * steps), int(last * steps)) for first, last in PARTS]

    def by_part(values: Floats) -> list[float]:
        errors = (values - cutoffs[1:]) ** 2
        return [float(errors[part].mean() ** 0.5) for part in parts]

    filters = [by_part(kalman(cutoffs, *variances)) for variances in GRID]
    best = min(filters, key=lambda errors: errors[-1])
    return {
        "thresholds of the run": by_part(thresholds),
        **{f"average with decay {decay}": by_part(average(cutoffs, decay)) for decay in DECAYS},
        "best filter of each part": [min(errors) for errors in zip(*filters)],
        "best filter of the last part": best,
    }


def test_recorded_thresholds_are_those_that_routed_the_step(tmp_path: Path) -> None:
    train([*TINY, "--train-iters", "12", "--et-warmup-iters", "0", "--run-dir", str(tmp_path)])
    thresholds, cutoffs = recorded(tmp_path)
    assert cutoffs.shape == (12, 4)
    # The first step has no threshold; decay 0.5 is that of the run.
    np.testing.assert_allclose(thresholds[-11:], average(cutoffs, 0.5), rtol=1e-5)
    table = recorded_errors(thresholds[-11:], cutoffs)
    assert table["thresholds of the run"] == pytest.approx(
        table["average with decay 0.5"], rel=1e-4
    )


def print_rows(rows: Mapping[str, Sequence[float]]) -> None:
    for name, values in rows.items():
        print("|", " | ".join([name, *(f"{value:.2f}" for value in values)]), "|")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_rows({name: errors(name) for name in DRIFTS})
    for folder in sys.argv[1:]:
        thresholds, cutoffs = recorded(Path(folder))
        print_rows(recorded_errors(thresholds[-len(cutoffs) + 1 :], cutoffs))
