"""Intervals over held-out prompts: of changes within a run, and of differences between runs.

Each prompt is compared with itself, so that easy and hard prompts do not count as noise. The
intervals are 95 % percentile intervals over bootstrap resamples of the prompts. For a single run
they show what this run did, and not whether another seed would do the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from alignment.evaluation.study.study_runs import GOLD, PROXY, SECOND, SeedGroup, StudyRun
from alignment.rounding import Floats
from alignment.statistics.bootstrap import LEVEL

RESAMPLES = 2000
_ROLES = {PROXY: "proxy", GOLD: "gold", SECOND: "second_gold"}
Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class PromptMean:
    """Mean over held-out prompts with its interval."""

    prompts: int
    value: float
    low: float
    high: float


def mean_with_interval(values: Floats) -> PromptMean | None:
    """Return the mean of one value per prompt with its interval; None with fewer than two.

    Args:
        values: Values, `[prompts]`.
    """
    if len(values) < 2:
        return None
    # Resamples of equal values have no spread, for which scipy warns.
    if float(np.ptp(values)) == 0.0:
        return PromptMean(len(values), float(values[0]), float(values[0]), float(values[0]))
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        random_state=0,
    ).confidence_interval  # fmt: skip
    return PromptMean(len(values), float(values.mean()), float(interval.low), float(interval.high))


def change_over_prompts(run: StudyRun, name: str, step: int | None = None) -> PromptMean | None:
    """Return the change of a grade since the first grading, with its interval.

    Args:
        run: Run.
        name: `PROXY`, `GOLD`, `SECOND` or "gap". Only prompts with all of its scores at both
            gradings count; proxy, gold and gap are over the same prompts.
        step: Step of the later grading. Default: the last one.

    Returns:
        The change; None where the run did not record the scores of the prompts.
    """
    graded = list(run.both or run.graded(PROXY))
    ends = (graded[0], graded[-1] if step is None else step) if graded else (0, 0)
    if ends[0] == ends[1] or not all(end in run.prompt_scores for end in ends):
        return None
    first, last = (_values(run.prompt_scores[end], name) for end in ends)
    shared = sorted(first.keys() & last.keys())
    return mean_with_interval(np.array([last[prompt] - first[prompt] for prompt in shared]))


def difference(one: SeedGroup, other: SeedGroup, name: str) -> tuple[int, PromptMean] | None:
    """Return the difference of a grade between two groups of runs, at the last common grading.

    With two or more seeds in both groups, the interval is Welch's over seeds. Otherwise it is over
    the held-out prompts that all runs have in common, with the mean over seeds for each.

    Args:
        one: Group that is subtracted.
        other: Group that it is subtracted from.
        name: `PROXY`, `GOLD` or `SECOND`.

    Returns:
        The step and the difference, with 0 prompts if the interval is over seeds; None without a
        common grading, or without the scores of prompts where they are needed.
    """
    groups = [[run for run in group.runs if run.graded(name)] for group in (one, other)]
    if not all(groups):
        return None
    common = set.intersection(*(set(run.graded(name)) for runs in groups for run in runs))
    if not common:
        return None
    step = max(common)
    if min(map(len, groups)) > 1:
        values = [np.array([run.graded(name)[step] for run in runs]) for runs in groups]
        value = float(values[1].mean() - values[0].mean())
        if max(float(np.ptp(scores)) for scores in values) == 0.0:
            return step, PromptMean(0, value, value, value)
        interval = stats.ttest_ind(*reversed(values), equal_var=False).confidence_interval(LEVEL)
        return step, PromptMean(0, value, float(interval.low), float(interval.high))
    if any(step not in run.prompt_scores for runs in groups for run in runs):
        return None
    means = [_mean_over_seeds([_values(r.prompt_scores[step], name) for r in g]) for g in groups]
    shared = sorted(means[0].keys() & means[1].keys())
    paired = mean_with_interval(np.array([means[1][p] - means[0][p] for p in shared]))
    return None if paired is None else (step, paired)


def _mean_over_seeds(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = set.intersection(*(set(of_seed) for of_seed in scores))
    return {prompt: float(np.mean([of_seed[prompt] for of_seed in scores])) for prompt in shared}


def _values(scores: Scores, name: str) -> dict[str, float]:
    """Return a grade of the prompts that have it, and proxy and gold if both are graded."""
    proxy, gold = scores.get("proxy", {}), scores.get("gold")
    values = {}
    for prompt, rewarded in proxy.items():
        right = gold.get(prompt) if gold is not None else 0.0
        if rewarded is None or right is None:
            continue
        value = rewarded - right if name == "gap" else scores.get(_ROLES[name], {}).get(prompt)
        if value is not None:
            values[prompt] = value
    return values
