"""Tests of forecasts of cutoffs: their brackets, and that a wrong one changes no result."""

import pytest
import torch

from megatron_ext.moe.forecast import Forecast
from megatron_ext.moe.order_statistics import kth_largest


def test_forecast_is_none_before_two_pools() -> None:
    forecast = Forecast()
    assert forecast.bracket() is None
    forecast.observe(torch.zeros(3))
    assert forecast.bracket() is None
    forecast.observe(torch.ones(3))
    assert forecast.bracket() is not None


def test_forecast_of_steady_cutoffs_contains_the_next_and_few_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    forecast, missed, contents = Forecast(), 0, []
    for step in range(30):
        logits = torch.randn(4096, 32, generator=generator) + 0.01 * step
        cutoffs = kth_largest([logits], [lambda n: n // 16], None).value
        if (bracket := forecast.bracket()) is not None:
            low, high = bracket
            missed += int(((cutoffs < low) | (cutoffs > high)).sum())
            contents.append(float(((logits >= low) & (logits <= high)).float().mean()))
        forecast.observe(cutoffs)
    assert missed <= 5  # of 896
    assert max(contents[3:]) < 0.1


def test_forecast_follows_cutoffs_that_jump() -> None:
    forecast = Forecast()
    for value in (0.0, 0.1, 5.0, 5.1):
        forecast.observe(torch.full((2,), value))
    low, high = forecast.bracket()  # type: ignore[misc]
    assert bool((low < 5.1).all()) and bool((high > 5.1).all())
    for _ in range(40):
        forecast.observe(torch.full((2,), 5.1))
    low, high = forecast.bracket()  # type: ignore[misc]
    assert float((high - low).max()) < 0.05


def test_forecast_ignores_cutoffs_that_are_not_finite() -> None:
    forecast = Forecast()
    for value in (1.0, 1.1, -torch.inf, torch.nan):
        forecast.observe(torch.tensor([1.0, value]))
    low, high = forecast.bracket()  # type: ignore[misc]
    assert bool(low.isfinite().all()) and bool(high.isfinite().all())
    assert low[1] < 1.1 < high[1]


@pytest.mark.parametrize("first", [torch.nan, -torch.inf])
def test_forecast_of_an_expert_without_a_cutoff_is_the_whole_range(first: float) -> None:
    forecast = Forecast()
    for _ in range(3):
        forecast.observe(torch.tensor([first, 0.5]))
    logits = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    result = kth_largest([logits], [lambda n: 7], None, [forecast.bracket()]).value
    assert torch.equal(result, logits.sort(dim=0, descending=True).values[6])
