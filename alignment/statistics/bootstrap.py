"""Bootstrap estimates: percentile intervals of figures from resampled groups of items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.statistics.coefficients import Undefined

# If the figure is undefined in a larger share of resamples, the others are not representative.
_MOST_UNDEFINED = 0.1
LEVEL = 0.95

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """Value of a figure with its interval.

    Attributes:
        value: Value over all items; None where it is undefined.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end of the 95 % interval; None where there is none.
        undefined: Number of resamples in which the figure is undefined; the interval omits them.
        reason: Why the value or the interval is missing.
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
    """Estimate every figure over all units, with intervals from the same resamples of groups.

    Args:
        figures: Functions by name. Each takes indices of units, in which a unit may occur several
            times, and returns a value, or raises `Undefined`. The value and the ends of its
            interval may be infinite.
        groups: Indices of the units that are drawn together, such as those of one prompt.
        resamples: Number of bootstrap resamples.
        seed: Seed of the random draws.
        advance: Function that is called before each resample, to report progress.

    Returns:
        The estimate of each figure, by name.
    """
    everything = np.concatenate([np.empty(0, np.int64), *groups])
    values: dict[K, list[float]] = {name: [] for name in figures}
    whole: dict[K, float | str] = {}
    for name, figure in figures.items():
        try:
            whole[name] = figure(everything)
        except Undefined as error:
            whole[name] = str(error)
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        advance()
        if len(groups) > 1:
            resample = generator.integers(0, len(groups), len(groups))
            places = np.concatenate([groups[number] for number in resample])
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
    # Interpolation between a number and infinity is impossible: take the outer resample instead.
    finite = np.isfinite(values).all()
    low = np.quantile(values, tail, method="linear" if finite else "lower")
    high = np.quantile(values, 1 - tail, method="linear" if finite else "higher")
    return Estimate(whole, float(low), float(high), undefined)
