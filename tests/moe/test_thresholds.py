"""Tests of rates, thresholds and selection against the formulas of the paper."""

from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.moe.routing_metrics import RoutingCounts
from megatron_ext.moe.threshold_estimators import StepCounts
from megatron_ext.moe.thresholds import (
    RoutingRate,
    Thresholds,
    _largest_by_sorting,
    select_by_threshold,
)
from tests.distributed import run_ranks


def test_routing_rate_is_exact() -> None:
    rate = RoutingRate(Fraction("0.3") / 1, Fraction("0.5"))
    assert [rate.k(n) for n in (10, 100, 0)] == [3, 30, 0]  # 0.3 * 10 is 3.0000000000000004
    assert RoutingRate(Fraction("0.29")).k(100) == 29  # 0.29 * 100 is 28.999999999999996
    assert (rate.k_min(100), rate.k_max(100)) == (15, 45)
    assert (RoutingRate(Fraction(1, 2)).k_min(8), RoutingRate(Fraction(1, 2)).k_max(8)) == (0, 8)
    assert RoutingRate(Fraction(9, 10), Fraction(1, 2)).k_max(10) == 10  # never above the pool


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0, 0.999))
def test_thresholds_are_the_bias_corrected_average(cutoffs: list[float], decay: float) -> None:
    thresholds = Thresholds(1, decay)
    raw = 0.0
    for count, cutoff in enumerate(cutoffs, start=1):
        thresholds.update(torch.tensor([cutoff]))
        raw = decay * raw + (1 - decay) * cutoff
        expected = raw / (1 - decay**count)
        assert thresholds.value().item() == pytest.approx(expected, abs=2e-5)
    assert int(thresholds.updates) == len(cutoffs)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.5, 0.9, 0.999]),
)
def test_thresholds_started_at_logits_are_just_below_them(
    logits: list[float], decay: float
) -> None:
    values = torch.tensor(logits)
    thresholds = Thresholds(len(logits), decay)
    thresholds.start_at(values)
    below = values - thresholds.value()
    assert (values > thresholds.value()).all() and thresholds.update_count == 1
    assert (below <= 4e-7 * values.abs() + 1e-40).all()
    # Training continues from there as after one step.
    thresholds.update(torch.ones(len(logits)))
    expected = (decay * values.double() + 1) / (1 + decay)
    torch.testing.assert_close(thresholds.value().double(), expected, atol=1e-4, rtol=1e-5)


def test_thresholds_without_an_update_have_no_value() -> None:
    with pytest.raises(UserError, match="no value yet"):
        Thresholds(2, 0.9).value()


def test_thresholds_ignore_a_cutoff_that_is_not_finite() -> None:
    thresholds = Thresholds(2, 0.5)
    thresholds.update(torch.tensor([1.0, 3.0]))
    thresholds.update(torch.tensor([-torch.inf, 4.0]))
    assert thresholds.value()[0] == 1.0
    assert thresholds.value()[1] > 3.0


def test_thresholds_keep_their_bits_in_every_dtype_of_the_model() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), Thresholds(3, 0.9))
    cutoffs = torch.tensor([0.1, 1 / 3, -2.7182818])
    model[1].update(cutoffs)
    before = model[1].value()
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        cast(model)
        assert model[1].average.dtype == torch.float32
        assert torch.equal(model[1].value(), before)
    restored: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), Thresholds(3, 0.9)).bfloat16()
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored[1].value(), before)
    assert restored[1].update_count == 1
    assert Thresholds(2, 0.9, device="meta").bfloat16().average.dtype == torch.float32


def adaptive_after(steps: int, seed: int = 1) -> Thresholds:
    """Return filters of three experts after some steps of noise, with counts."""
    thresholds = Thresholds(3, 0.9, adaptive=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        cutoffs = torch.randn(3, generator=generator)
        above = torch.randint(0, 64, (3,), generator=generator)
        thresholds.update(cutoffs, StepCounts(above, 32, 128))
    return thresholds


def test_adaptive_thresholds_continue_from_their_state() -> None:
    whole, first = adaptive_after(5), adaptive_after(3)
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), Thresholds(3, 0.0, adaptive=True))
    model.bfloat16()[1].load_state_dict(first.state_dict())
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        cutoffs = torch.randn(3, generator=generator)
        above = torch.randint(0, 64, (3,), generator=generator)
        if step >= 3:
            model[1].update(cutoffs, StepCounts(above, 32, 128))
    assert model[1].filter.dtype == torch.float32
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model[1].state_dict()[name], tensor), name
    assert Thresholds(2, 0.9, device="meta", adaptive=True).half().filter.dtype == torch.float32  # type: ignore[union-attr]


def test_adaptive_thresholds_begin_at_those_of_a_state_without_filters() -> None:
    state = adaptive_after(4).state_dict()
    del state["filter"]
    thresholds = Thresholds(3, 0.9, adaptive=True)
    thresholds.load_state_dict(state)
    value = thresholds.value()
    assert torch.equal(value, state["average"]) and thresholds.update_count == 4
    cutoffs = value + torch.tensor([1.0, -1.0, 0.5])
    thresholds.update(cutoffs, StepCounts(torch.tensor([40, 20, 36]), 32, 128))
    # They count as one cutoff of the past: most of the next one is followed.
    share = (thresholds.value() - value) / (cutoffs - value)
    assert ((share > 0.5) & (share < 1.0)).all()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*filter"):
        Thresholds(3, 0.9).load_state_dict(adaptive_after(4).state_dict())


def test_adaptive_thresholds_start_below_logits_and_ignore_what_is_not_finite() -> None:
    thresholds = adaptive_after(10)
    values = torch.tensor([0.1, -3.0, 200.0])
    thresholds.start_at(values)
    below = values - thresholds.value()
    assert (below > 0).all() and (below <= 4e-7 * values.abs()).all()
    counts = StepCounts(torch.tensor([0, 40, 20]), 32, 128)
    thresholds.update(torch.tensor([-torch.inf, torch.nan, 201.0]), counts)
    assert torch.equal(thresholds.value()[:2] < values[:2], torch.tensor([True, True]))
    assert thresholds.value()[2] > 200.4
    untouched = Thresholds(2, 0.0, adaptive=True)
    untouched.update(torch.tensor([-torch.inf, 1.0]))
    assert untouched.value().tolist() == [0.0, 1.0]
    untouched.update(torch.tensor([2.0, 1.0]), StepCounts(torch.tensor([3, 3]), 2, 8))
    assert untouched.value()[0] == 2.0


def reference_selection(x: torch.Tensor, c: torch.Tensor, rate: RoutingRate) -> torch.Tensor:
    """Select token by token above the threshold, cut to k_max or filled to k_min by logit."""
    tokens, experts = x.shape
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    k = floor(rate.rate * tokens)
    for expert in range(experts):
        ranking = sorted(range(tokens), key=lambda t: (-float(x[t, expert]), t))
        count = sum(float(x[t, expert]) > float(c[expert]) for t in range(tokens))
        if rate.capacity is not None:
            most = min(tokens, floor(k * (1 + rate.capacity)))
            count = min(max(count, floor(k * (1 - rate.capacity))), most)
        chosen[ranking[:count], expert] = True
    return chosen


selection_case = st.tuples(
    st.integers(1, 200),  # tokens
    st.integers(0, 2**31),  # seed
    st.sampled_from([0.0, 1.0, 4.0]),  # rounding: ties or none
    st.sampled_from([None, "0", "0.25", "0.5", "0.99"]),  # capacity
    st.floats(-2, 2),  # range of the thresholds
)


def check_selection(case: tuple, world: int, rank: int, group: object) -> None:
    tokens, seed, rounding, capacity, centre = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, generator=generator)
    if rounding:
        x = (x * rounding).round() / rounding
    c = centre + torch.randn(5, generator=generator)
    rate = RoutingRate(Fraction(3, 16), None if capacity is None else Fraction(capacity))
    expected = reference_selection(x, c, rate)
    places = torch.arange(tokens)[rank::world]
    chosen = select_by_threshold(x[places], c, rate, places, group)  # type: ignore[arg-type]
    assert torch.equal(chosen, expected[places])
    if group is None:  # as on a GPU
        shuffled = torch.randperm(tokens, generator=generator)
        by_sorting = _largest_by_sorting(x[shuffled], expected.sum(dim=0), shuffled)
        assert torch.equal(by_sorting, expected[shuffled])


@given(selection_case)
def test_select_by_threshold_equals_the_definition(case: tuple) -> None:
    check_selection(case, 1, 0, None)


def selection_on_ranks(seeds: int) -> None:
    for seed in range(seeds):
        capacity = [None, "0", "0.25", "0.5"][seed % 4]
        case = (150 + seed, seed, [0.0, 1.0][seed % 2], capacity, (seed % 5) - 2.0)
        check_selection(case, dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def test_select_by_threshold_with_global_pool_equals_the_definition() -> None:
    run_ranks(selection_on_ranks, 3, 24, timeout=60)


def test_select_by_sorting_counts_nan_as_absent() -> None:
    x = torch.tensor([[torch.nan, 1.0], [-torch.inf, torch.nan], [2.0, 0.0]])
    chosen = _largest_by_sorting(x, torch.tensor([3, 1]), torch.arange(3))
    assert chosen.tolist() == [[False, True], [True, False], [True, False]]


@pytest.mark.parametrize("capacity", [None, Fraction(1, 2)])
def test_select_by_threshold_does_not_wait_for_the_device(capacity: Fraction | None) -> None:
    # The meta device has no values: whatever asks for one fails.
    logits = torch.empty(64, 4, device="meta")
    thresholds = Thresholds(4, 0.9, device="meta", adaptive=True)
    thresholds.update(logits[0])
    above = torch.zeros(4, dtype=torch.int64, device="meta")
    thresholds.update(logits[1], StepCounts(above, 16, 64))
    positions = torch.empty(64, dtype=torch.int64, device="meta")
    rate = RoutingRate(Fraction(1, 4), capacity)
    routing_map = select_by_threshold(logits, thresholds.value(), rate, positions, None)
    assert routing_map.shape == logits.shape
    counts = RoutingCounts(4).to("meta")
    counts.add(routing_map, logits > thresholds.value(), by_threshold=True)
