"""Comparison of values that carry a rounding error: the one place that decides what is equal.

The last digits of a model's score depend on the padding and the composition of its batch, on the
layout and on the dtype, because sums are taken in another order. Whether scores are equal, tied,
constant or better is therefore decided relative to the error of the scores, never to the precision
in which they are stored.

An error is relative to the size of a value: values x and y count as equal when |x - y| is at most
the error times the larger of |x| and |y|. That does not depend on the unit of the values. Whole
numbers are labels and counts, which carry no error.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

EXACT = 2.0**-40
"""Relative error of values that a program computed in fp64 by a few operations, about 1e-12."""

SINGLE = 2.0**-17
"""Relative error of a score that a model computed in fp32, about 8e-6: 64 units of rounding.

Also assumed where nothing is known of a value's origin.
"""

# In lower precision the last operation dominates: half a unit of rounding of a logit. Measured on
# random Llamas in batches of other sizes and paddings: up to 3e-7 in fp32, and 2e-3 in bf16.
_OF_DTYPE = {"float64": EXACT, "float32": SINGLE, "float16": 2.0**-10, "bfloat16": 2.0**-8}


def model_error(dtype: object) -> float:
    """Return the relative error of scores that a model computes in a dtype.

    Args:
        dtype: a torch dtype or its name.
    """
    return _OF_DTYPE.get(str(dtype).removeprefix("torch."), SINGLE)


def tolerance(values: ArrayLike, error: float = SINGLE, size: float = 0.0) -> float:
    """Return the largest difference between two of the values that rounding explains.

    Args:
        values: of one unit, any shape; NaN is ignored.
        error: relative error of the values.
        size: magnitude of the numbers that the values were computed from, if it is larger than
            theirs: a difference of two scores has the error of the scores.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if not array.size:
        return 0.0
    if (array == np.round(array)).all():
        error = EXACT
    return max(error, EXACT) * max(float(np.abs(array).max()), size)


def is_constant(values: ArrayLike, error: float = SINGLE, size: float = 0.0) -> bool:
    """Return whether all values are the same but for rounding; True where there is none.

    For the arguments see `tolerance`.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    return not array.size or float(np.ptp(array)) <= tolerance(array, error, size)


def exceeds(value: float, other: float, error: float = SINGLE, size: float = 0.0) -> bool:
    """Return whether a value is greater than another by more than rounding.

    Args:
        value: Value.
        other: Value that it is compared with.
        error: Relative error of both.
        size: Magnitude of the numbers that they were computed from, if it is larger than both: the
            size of the scores for a difference of scores, 1 for a correlation.
    """
    if math.isinf(value) or math.isinf(other):
        return value > other
    return value - other > max(error, EXACT) * max(abs(value), abs(other), size)


def tied(*arrays: ArrayLike, error: float = SINGLE) -> list[Floats]:
    """Return the arrays with values that are equal but for rounding replaced by one value.

    Values are sorted over all arrays; each run begins at the smallest value left and takes in what
    equals that value. So ties are transitive, and no run is wider than the error, however densely
    the values lie.

    Args:
        arrays: of one unit, any shapes; NaN stays NaN.
        error: relative error of the values.
    """
    inputs = [np.asarray(array, dtype=np.float64) for array in arrays]
    values = np.unique(np.concatenate([array.ravel() for array in inputs]))
    values = values[np.isfinite(values)]
    first = values.copy()
    if values.size and not (values == np.round(values)).all():
        reach = max(error, EXACT)
        # Only neighbours that are equal can begin a run: few values in most data.
        close = np.diff(values) <= reach * np.maximum(np.abs(values[1:]), np.abs(values[:-1]))
        for place in np.flatnonzero(close):
            start, value = first[place], values[place + 1]
            if value - start <= reach * max(abs(value), abs(start)):
                first[place + 1] = start
    return [_replaced(array, values, first) for array in inputs]


def nearest_whole(values: ArrayLike) -> Floats:
    """Return the nearest whole numbers, halves up; what is a half but for rounding is a half."""
    inputs = np.asarray(values, dtype=np.float64)
    return np.floor(inputs + 0.5 + SINGLE * np.maximum(np.abs(inputs), 1.0))


def _replaced(array: Floats, values: Floats, first: Floats) -> Floats:
    finite = np.isfinite(array)
    result = array.copy()
    result[finite] = first[np.searchsorted(values, array[finite])]
    return result
