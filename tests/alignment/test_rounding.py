"""Tests of equality within the rounding error of values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment.rounding import (
    EXACT,
    SINGLE,
    exceeds,
    is_constant,
    model_error,
    nearest_whole,
    tied,
    tolerance,
)

SCORES = st.lists(st.floats(0.01, 9), min_size=1, max_size=30)
UNITS = [1e-6, 1.0, 1e6]


@pytest.mark.parametrize("unit", UNITS)
def test_is_constant_for_fp32_rounding_but_not_for_small_differences(unit) -> None:
    score = 3.930933041595413
    noise = np.array([score, score + 2e-6, score - 2e-6])
    assert is_constant(noise * unit) and not is_constant(noise * unit, EXACT)
    for near, other in ((7.0, 7.01), (0.30, 0.31), (0.0, 1e-3), (8.999, 9.0)):
        assert not is_constant(np.array([near, other]) * unit)
        assert exceeds(other * unit, near * unit) and not exceeds(near * unit, other * unit)


def test_tolerance_of_whole_numbers_is_exact() -> None:
    assert not is_constant([1_000_000, 1_000_001])
    assert is_constant([1_000_000.5, 1_000_001.5])
    assert tied([1_000_000, 1_000_001])[0].tolist() == [1_000_000, 1_000_001]


def test_is_constant_without_values() -> None:
    assert is_constant([]) and is_constant([np.nan]) and is_constant([np.nan, 2.0])
    assert tolerance([]) == 0


def test_exceeds_uses_the_size_of_the_compared_numbers() -> None:
    assert exceeds(1e-6, 0.0) and not exceeds(1e-6, 0.0, size=1.0)
    assert not exceeds(0.07 - 0.05, 0.02, EXACT)
    assert exceeds(-1.0, -np.inf) and exceeds(np.inf, 1.0) and not exceeds(-np.inf, -1.0)


def test_model_error_of_a_dtype_is_above_its_rounding() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.finfo(dtype).eps / 2 <= model_error(dtype) < 0.01
    assert model_error("float32") == model_error(torch.float32) == SINGLE


@given(SCORES, st.integers(0, 2**32 - 1))
def test_tied_values_are_those_without_noise(scores: list[float], seed: int) -> None:
    values = np.round(scores, 2)
    noisy = values * (1 + np.random.default_rng(seed).uniform(-1e-6, 1e-6, len(values)))
    [result] = tied(noisy)
    assert (np.equal.outer(result, result) == np.equal.outer(values, values)).all()
    assert (np.sign(np.subtract.outer(result, result))
            == np.sign(np.subtract.outer(values, values))).all()  # fmt: skip


def test_tied_runs_do_not_extend_along_dense_values() -> None:
    dense = 5 * (1 + SINGLE / 2) ** np.arange(100)
    [result] = tied(dense)
    assert (np.abs(result - dense) <= SINGLE * dense).all()
    assert 30 < len(np.unique(result)) < 60 and (np.diff(result) >= 0).all()


def test_tied_over_several_arrays_with_missing_values() -> None:
    a, b = tied([5.0, np.nan, 7.5], [[5.000001], [7.4999999]])
    assert a[0] == b[0, 0] and a[2] == b[1, 0] and np.isnan(a[1]) and b.shape == (2, 1)


def test_nearest_whole_rounds_halves_up_within_rounding() -> None:
    assert nearest_whole([4.5, 4.499999, 4.49, -0.5, 0.0]).tolist() == [5, 5, 4, 0, 0]
    assert float(nearest_whole(0.35 / 0.1)) == 4  # 3.4999999999999996
