"""How far a figure can be trusted: percentile intervals from resampled groups of items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.statistics.coefficients import Undefined

# Beyond this share of resamples without a value, what is left tells another story.
_MOST_UNDEFINED = 0.1
LEVEL = 0.95

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A figure, or why there is none, and its interval, or why there is none.

    Attributes:
        undefined: resamples in which the figure has no value; they do not count.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined: int = 0
    reason: str = ""


def estimates[K](
    figures: Mapping[K, Callable[[Indices], float]],
    groups: Sequence[Indices],
    resamples: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[K, Estimate]:
    """Every figure over all units, with an interval from the same resamples of groups.

    Args:
        figures: each takes places of units, some several times, and may raise `Undefined`, or be
            infinite; so may be the ends of its interval.
        groups: places of the units that are drawn together: those of one item, or of one prompt.
        advance: told of each resample.
    """
    everything = np.concatenate([np.empty(0, np.int64), *groups])
    values: dict[K, list[float]] = {name: [] for name in figures}
    whole: dict[K, float | str] = {}
    for name, figure in figures.items():
        try:
            whole[name] = figure(everything)
        except Undefined as error:
            whole[name] = str(error)
    draw = np.random.default_rng(seed)
    for _ in range(resamples):
        advance()
        if len(groups) > 1:
            drawn = draw.integers(0, len(groups), len(groups))
            places = np.concatenate([groups[number] for number in drawn])
            for name, figure in figures.items():
                if not isinstance(whole[name], str):
                    try:
                        values[name].append(figure(places))
                    except Undefined:
                        pass
    return {name: _estimate(whole[name], values[name], resamples, len(groups)) for name in figures}


def _estimate(whole: float | str, values: list[float], resamples: int, groups: int) -> Estimate:
    if isinstance(whole, str):
        return Estimate(None, reason=whole)
    if groups < 2:
        return Estimate(whole, reason="no interval: there is one group to resample")
    undefined = resamples - len(values)
    if undefined > _MOST_UNDEFINED * resamples or not values:
        reason = f"no interval: undefined in {undefined} of {resamples} resamples"
        return Estimate(whole, undefined=undefined, reason=reason)
    tail = (1 - LEVEL) / 2
    # Between a number and infinity nothing can be interpolated: then the outer resample counts.
    finite = np.isfinite(values).all()
    low = np.quantile(values, tail, method="linear" if finite else "lower")
    high = np.quantile(values, 1 - tail, method="linear" if finite else "higher")
    return Estimate(whole, float(low), float(high), undefined)
