"""Metrics over seeds: means with Student's t-intervals, and changes since the first grading."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from alignment.evaluation.study.prompt_intervals import change_over_prompts
from alignment.evaluation.study.study_runs import (
    GAP,
    GOLD,
    KL,
    PROXY,
    SECOND,
    SLOPE,
    SeedGroup,
    StudyRun,
)
from alignment.rounding import Floats
from alignment.statistics.bootstrap import LEVEL


@dataclass(frozen=True)
class SeedMean:
    """Mean over seeds.

    Attributes:
        n: Number of seeds.
        value: Mean; None without a seed.
        low: Lower end of the 95 % t-interval of the mean over seeds or, for the change of a single
            run, of the bootstrap interval over its held-out prompts; None where neither is known.
        high: Upper end of the interval.
        prompts: Number of held-out prompts that the interval is over; 0 if it is over seeds.
    """

    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    prompts: int = 0

    def text(self, form: str = "{:.2f}") -> str:
        """Return the mean with its interval as text."""
        if self.value is None:
            return "–"
        value = form.format(self.value)
        if self.low is None or self.high is None:
            return value
        return f"{value} ({form.format(self.low)} to {form.format(self.high)})"


def mean_of(values: Iterable[float | None]) -> SeedMean:
    """Return the mean of one value per seed, without those that are None."""
    present = [value for value in values if value is not None]
    if not present:
        return SeedMean(0)
    value = float(np.mean(present))
    if len(present) < 2:
        return SeedMean(1, value)
    reach = _reach(float(np.std(present, ddof=1)) / len(present) ** 0.5, len(present))
    return SeedMean(len(present), value, value - reach, value + reach)


def _reach(error: float, n: int) -> float:
    """Return half the width of the t-interval of a mean of n values with a standard error."""
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error


def curve(group: SeedGroup, name: str) -> tuple[list[int], list[SeedMean]]:
    """Return the curve of a metric over gradings.

    Returns:
        The steps of the gradings, and the mean at each over the seeds that have the metric there.
        The interval of a single run is that of its change since the first grading.
    """
    series = [run.graded(name) for run in group.graded]
    steps = sorted({step for values in series for step in values})
    means = [mean_of(values.get(step) for values in series) for step in steps]
    if len(group.graded) == 1 and name in (PROXY, GOLD, SECOND):
        means = [_around(group.graded[0], name, step, mean) for step, mean in zip(steps, means)]
    return steps, means


def _around(run: StudyRun, name: str, step: int, mean: SeedMean) -> SeedMean:
    """Return the grade of a single run with the width of the interval of its change."""
    change = change_over_prompts(run, name, step)
    if change is None or mean.value is None:
        return mean
    low, high = (mean.value + end - change.value for end in (change.low, change.high))
    return SeedMean(1, mean.value, low, high, change.prompts)


def first_and_last(run: StudyRun, name: str) -> tuple[float, float] | None:
    """Return a metric at the first and last grading that have it.

    Proxy, gold and their gap are taken at gradings that have both proxy and gold, the proxy of a
    run without gold at all of them.

    Returns:
        The two values; None with fewer than two such gradings.
    """
    if name == PROXY and not run.graded(GOLD):
        values = list(run.graded(PROXY).values())
    elif name in (PROXY, GOLD):
        values = [pair[name == GOLD] for pair in run.both.values()]
    elif name == "gap":
        values = [proxy - gold for proxy, gold in run.both.values()]
    else:
        values = list(run.graded(name).values())
    return (values[0], values[-1]) if len(values) > 1 else None


@dataclass(frozen=True)
class Trend:
    """Metric at the first and last grading, and its change."""

    first: SeedMean
    last: SeedMean
    change: SeedMean


def trend_of(group: SeedGroup, name: str) -> Trend:
    """Return first, last and change of a metric, over the seeds that have two gradings of it."""
    ends = [(run, values) for run in group.runs if (values := first_and_last(run, name))]
    change = mean_of(last - first for _, (first, last) in ends)
    if len(ends) == 1:
        change = _over_prompts(ends[0][0], name, change)
    return Trend(
        mean_of(first for _, (first, _) in ends), mean_of(last for _, (_, last) in ends), change
    )


def last_steps(group: SeedGroup) -> list[int]:
    """Return the steps of the last gradings up to which `trend_of` takes the changes of grades.

    There are several where runs stop early. Each change counts nevertheless: a common last step
    would let a run that stops early hide what the others became.
    """
    graded = [list(run.both or run.graded(PROXY)) for run in group.runs]
    return sorted({steps[-1] for steps in graded if len(steps) > 1})


def _over_prompts(run: StudyRun, name: str, change: SeedMean) -> SeedMean:
    """Return the change of a single run with its interval over held-out prompts.

    Runs of older versions recorded only standard errors of the changes.
    """
    if (paired := change_over_prompts(run, name)) is not None:
        return SeedMean(1, paired.value, paired.low, paired.high, paired.prompts)
    if (result := run.error(GAP if name == "gap" else name)) is None or change.value is None:
        return change
    error, prompts = result
    reach = _reach(error, prompts)
    return SeedMean(1, change.value, change.value - reach, change.value + reach, prompts)


def trends_of(group: SeedGroup) -> dict[str, Trend]:
    """Return the trends of proxy, gold, second gold and the gap of proxy over gold, by title."""
    names = {"proxy": PROXY, "gold": GOLD, "second gold": SECOND, "proxy - gold": "gap"}
    return {title: trend_of(group, name) for title, name in names.items()}


def last(group: SeedGroup, name: str) -> SeedMean:
    """Return the mean of a metric at the last grading of each run that has it."""
    return mean_of(next(reversed(run.graded(name).values()), None) for run in group.runs)


slope, kl = partial(last, name=SLOPE), partial(last, name=KL)


def detectors(groups: Sequence[SeedGroup], prefix: str) -> list[str]:
    """Return the detectors whose shares any run logged under a prefix, also those of users.

    Args:
        groups: Groups of runs.
        prefix: `HELD_OUT` or `TRAINING`.
    """
    rows = [
        row
        for group in groups
        for run in group.runs
        for row in (*run.training.values(), *run.gradings.values())
    ]
    columns = {key for row in rows for key in row if key.startswith(prefix)}
    others = {key for row in rows for key in columns & row.keys() if not 0 <= (row[key] or 0) <= 1}
    return sorted(key.removeprefix(prefix) for key in columns - others)


def shares(group: SeedGroup, prefix: str, name: str) -> tuple[SeedMean, SeedMean]:
    """Return the share of responses that a detector flags, at the beginning and at the end.

    Args:
        group: Runs that differ in their seed.
        prefix: `HELD_OUT` for the first and last grading, or `TRAINING` for the first and last
            tenth of the training steps.
        name: Name of the detector.
    """
    ends: Callable[[StudyRun], tuple[float | None, float | None]]
    if prefix == HELD_OUT:
        ends = partial(_gradings, name=prefix + name)
    else:
        ends = partial(tenths, name=prefix + name)
    values = [ends(run) for run in group.runs]
    return mean_of(first for first, _ in values), mean_of(last for _, last in values)


TRAINING, HELD_OUT = "monitor/", "monitor_held_out/"


def _gradings(run: StudyRun, name: str) -> tuple[float | None, float | None]:
    values = list(run.graded(name).values())
    return (values[0], values[-1]) if values else (None, None)


def tenths(run: StudyRun, name: str) -> tuple[float | None, float | None]:
    """Return the means of a training figure over the first and the last tenth of its steps."""
    values: Floats = np.array(list(run.trained(name).values()))
    if not len(values):
        return None, None
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())
