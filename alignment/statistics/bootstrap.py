"""Bootstrap estimates: percentile intervals of measures from resampled groups of items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.statistics.coefficients import Undefined

# If the measure is undefined in a larger share of resamples, the others are not representative.
_MOST_UNDEFINED = 0.1
LEVEL = 0.95

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """Value of a measure with its interval.

    Attributes:
        value: Value over all items; None where it is undefined.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end of the 95 % interval; None where there is none.
        undefined: Number of resamples in which the measure is undefined; the interval omits them.
        reason: Why the value or the interval is missing.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined: int = 0
    reason: str = ""


def estimates[K](
    measures: Mapping[K, Callable[[Indices], float]],
    groups: Sequence[Indices],
    resamples: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[K, Estimate]:
    """Estimate every measure over all units, with intervals from the same resamples of groups.

    Args:
        measures: Functions by name. Each takes indices of units, in which a unit may occur several
            times, and returns a value, or raises `Undefined`. The value and the ends of its
            interval may be infinite.
        groups: Indices of the units that are drawn together, such as those of one prompt.
        resamples: Number of bootstrap resamples.
        seed: Seed of the random draws.
        advance: Function that is called before each resample, to report progress.

    Returns:
        The estimate of each measure, by name.
    """
    all_units = np.concatenate([np.empty(0, np.int64), *groups])
    values: dict[K, list[float]] = {name: [] for name in measures}
    full_values: dict[K, float | str] = {}
    for name, measure in measures.items():
        try:
            full_values[name] = measure(all_units)
        except Undefined as error:
            full_values[name] = str(error)
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        advance()
        if len(groups) > 1:
            resample = generator.integers(0, len(groups), len(groups))
            places = np.concatenate([groups[number] for number in resample])
            for name, measure in measures.items():
                if not isinstance(full_values[name], str):
                    try:
                        values[name].append(measure(places))
                    except Undefined:
                        pass
    return {
        name: _estimate(full_values[name], values[name], resamples, len(groups))
        for name in measures
    }


def _estimate(
    full_value: float | str, values: list[float], resamples: int, groups: int
) -> Estimate:
    if isinstance(full_value, str):
        return Estimate(None, reason=full_value)
    if groups < 2:
        return Estimate(full_value, reason="no interval: there is one group to resample")
    undefined = resamples - len(values)
    if undefined > _MOST_UNDEFINED * resamples or not values:
        reason = f"no interval: undefined in {undefined} of {resamples} resamples"
        return Estimate(full_value, undefined=undefined, reason=reason)
    tail = (1 - LEVEL) / 2
    # Interpolation between a number and infinity is impossible: take the outer resample instead.
    finite = np.isfinite(values).all()
    low = np.quantile(values, tail, method="linear" if finite else "lower")
    high = np.quantile(values, 1 - tail, method="linear" if finite else "higher")
    return Estimate(full_value, float(low), float(high), undefined)
