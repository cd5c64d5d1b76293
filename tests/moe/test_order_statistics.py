"""Tests of the distributed order statistic against a sort of the gathered logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_ext.moe.candidates import column_counts, order_preserving_image, value_of_image
from megatron_ext.moe.forecast import Forecast
from megatron_ext.moe.order_statistics import Bracket, kth_largest, top_k_mask
from tests.collectives import Collectives, counted_collectives
from tests.distributed import run_ranks

KINDS = ["normal", "skewed", "tied", "constant", "infinite", "absent", "bf16", "zeros", "huge"]
BRACKETS = ["sampled", "near", "narrow", "below", "above", "anywhere", "useless"]


def make_logits(kind: str, tokens: int, experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts, generator=generator)
    coin = torch.rand(tokens, experts, generator=generator) < 0.5
    match kind:
        case "skewed":  # the parts of the ranks have different distributions
            x += 10 * torch.arange(tokens).unsqueeze(1) / max(tokens, 1)
        case "tied":
            x = (2 * x).round() / 2
        case "constant":
            x[:] = 1.5
        case "infinite":
            x[coin] = -torch.inf
        case "absent":
            x[coin] = torch.nan
        case "bf16":
            x = x.bfloat16().float()
        case "zeros":
            x = torch.where(coin, 0.0, -0.0)
        case "huge":
            x = torch.where(coin, x * 1e38, x * 1e-42)
    return x


def brute_force(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cutoffs and mask of the k largest of each column by a stable sort."""
    present = x.nan_to_num(-torch.inf, torch.inf, -torch.inf) + 0.0
    order = present.sort(dim=0, descending=True, stable=True)
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(0, order.indices[:k], True)
    return order.values[k - 1], mask & ~x.isnan()


def make_bracket(kind: str, answer: torch.Tensor, seed: int) -> Bracket | None:
    """Return a bracket that is right, wrong in some way, or None."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(len(answer), generator=generator) * 10 ** (seed % 9 - 6)
    anywhere = 3 * torch.randn(2, len(answer), generator=generator)
    match kind:
        case "near":
            return answer - width, answer + width
        case "narrow":
            return answer, answer
        case "below":
            return answer - 3 * width - 1e-3, answer - width - 1e-3
        case "above":
            return answer + width + 1e-3, answer + 3 * width + 1e-3
        case "anywhere":  # upside down for some columns
            return anywhere[0], anywhere[1]
        case "useless":
            return torch.full_like(answer, torch.nan), torch.full_like(answer, torch.inf)
    return None


case = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "bracket": st.sampled_from(BRACKETS),
        "tokens": st.integers(1, 6000),
        "experts": st.integers(1, 9),
        "share": st.floats(0, 1),
        "seed": st.integers(0, 2**31),
        "splits": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "shuffled": st.booleans(),
    }
)


def check(case: dict[str, Any], group: Any, rank: int, world: int) -> None:
    tokens = case["tokens"]
    x = make_logits(case["kind"], tokens, case["experts"], case["seed"])
    k = max(1, round(case["share"] * tokens))
    # Uneven parts, some of them empty; positions need not follow the ranks.
    bounds = [0, *sorted(int(s * tokens) for s in case["splits"][: world - 1]), tokens]
    generator = torch.Generator().manual_seed(case["seed"])
    order = torch.randperm(tokens, generator=generator) if case["shuffled"] else None
    places = torch.arange(tokens) if order is None else order
    places = places[bounds[rank] : bounds[rank + 1]]
    value, expected = brute_force(x, k)
    bracket = make_bracket(case["bracket"], value, case["seed"])
    pieces = x[places].tensor_split(1 + case["seed"] % 3)
    counts = torch.arange(6).view(2, 3) + rank

    cutoffs = kth_largest([pieces], [lambda total: k], group, [bracket], counts)
    mask = top_k_mask(x[places], cutoffs, places, group)

    torch.testing.assert_close(cutoffs.value, value, rtol=0, atol=0)
    assert torch.equal(cutoffs.greater, (x > value).sum(0))
    assert torch.equal(cutoffs.at_least, (x >= value).sum(0))
    assert cutoffs.tokens.tolist() == [tokens] * case["experts"]
    assert torch.equal(mask, expected[places])
    assert torch.equal(counts, torch.arange(6).view(2, 3) * world + sum(range(world)))


def check_on_ranks(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        check(case, dist.group.WORLD, dist.get_rank(), dist.get_world_size())


@given(case)
@settings(max_examples=80)
def test_kth_largest_and_mask_equal_a_sort_on_one_rank(case: dict[str, Any]) -> None:
    check(case, None, 0, 1)


@pytest.mark.parametrize("world", [2, 3, 4])
@given(cases=st.lists(case, min_size=12, max_size=12))
@settings(max_examples=4, phases=[Phase.generate])  # shrinking would start ranks by the dozen
def test_kth_largest_and_mask_equal_a_sort_of_all_ranks(
    world: int, cases: list[dict[str, Any]]
) -> None:
    run_ranks(check_on_ranks, world, cases, timeout=60)


def many_pools_on_a_rank() -> None:
    """Check that pools of several layers and ranks have the same results together and alone."""
    rank = dist.get_rank()
    pools = [make_logits(kind, 700 + 100 * rank, 4, rank) for kind in KINDS]
    rank_of = [lambda n, i=i: max(1, n // (i + 2)) for i in range(len(pools))]
    together = kth_largest(pools, rank_of, dist.group.WORLD)
    alone = [kth_largest([p], [r], dist.group.WORLD) for p, r in zip(pools, rank_of)]
    for name in together._fields:
        expected = torch.cat([getattr(cutoffs, name) for cutoffs in alone])
        assert torch.equal(getattr(together, name), expected), name


def test_kth_largest_of_pools_together_equals_one_at_a_time() -> None:
    run_ranks(many_pools_on_a_rank, 2)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_image_preserves_order_and_value(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    images = order_preserving_image(x)
    assert torch.equal(images.unsqueeze(0) < images.unsqueeze(1), x.unsqueeze(0) < x.unsqueeze(1))
    assert torch.equal(value_of_image(images), x)


@pytest.mark.parametrize("rows, n", [(0, 3), (5, 1), (1024, 3), (3000, 7), (263_000, 2)])
def test_column_counts_equal_a_sum(rows: int, n: int) -> None:
    coin = torch.rand(rows, n, generator=torch.Generator().manual_seed(0))
    for mask in (coin < 0.3, coin < 2, (coin < 0.5).t().contiguous().t()):
        assert torch.equal(column_counts(mask), mask.sum(dim=0))


def test_kth_largest_counts_nan_as_absent_and_missing_as_minus_infinity() -> None:
    x = torch.tensor([[float("nan"), 1.0], [2.0, float("nan")], [float("nan"), 0.5]])
    cutoffs = kth_largest([x], [lambda _: 2], None)
    assert cutoffs.value.tolist() == [-torch.inf, 0.5]
    assert not top_k_mask(x, cutoffs, torch.arange(3), None)[x.isnan()].any()


def wide_search() -> list[Collectives]:
    """Search 48 layers of 128 experts, with wrong forecasts for some experts."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    forecasts = [Forecast() for _ in range(48)]
    used = []
    for step in range(5):
        pools = [torch.randn(300, 128, generator=generator) + 0.02 * step for _ in forecasts]
        if step == 4:
            for pool in pools:
                pool[:, ::40] += 1.0
        brackets = [forecast.bracket() for forecast in forecasts]
        counts = torch.ones(48, 5 * 128 + 1, dtype=torch.int64)
        ranks = [lambda tokens: tokens // 16] * 48
        with counted_collectives() as collectives:
            result = kth_largest(pools, ranks, dist.group.WORLD, brackets, counts)
        used.append(collectives)
        parts = [torch.empty(300, 48 * 128) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, torch.cat(pools, dim=1))
        expected = torch.cat(parts).topk(int(result.k[0]), dim=0).values[-1]
        assert torch.equal(result.value, expected)
        assert bool((counts == dist.get_world_size()).all())
        for forecast, cutoff in zip(forecasts, result.value.view(48, 128)):
            forecast.observe(cutoff)
    return used


def test_kth_largest_of_6144_experts_takes_four_reductions_and_four_megabytes() -> None:
    first, second = run_ranks(wide_search, 2)
    for collectives, other in zip(first, second):
        assert collectives == other
        assert set(collectives.calls) == {"all_reduce"}
        assert len(collectives.calls) <= 4
        # However many ranks there are, a ring passes on at most twice what each handed in.
        assert 2 * collectives.payload <= 4e6


def test_kth_largest_with_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be >= 1"):
        kth_largest([torch.zeros(3, 2)], [lambda n: n // 16], None)
