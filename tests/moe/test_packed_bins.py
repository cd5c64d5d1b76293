"""Tests of the packed histograms of a search round against counting every value."""

import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.moe import bracket_search, packed_bins
from megatron_ext.moe.packed_bins import PackedBins

# Width of a bracket, values in it over all ranks, whether it is done, and whether it was replaced.
columns = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 7, 4096, 1 << 20, 1 << 32]),
        st.sampled_from([1, 2, 3, 200, 5000]),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def draw_offsets(width: torch.Tensor, inside: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """Draw column and offset of as many values as each bracket has."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.arange(len(width)).repeat_interleave(inside)
    share = torch.rand(len(column), generator=generator, dtype=torch.float64)
    return column, (share * width[column]).long()


@given(columns, st.integers(0, 2**31), st.integers(1, 4))
def test_sum_of_ranks_unpacks_to_the_histogram_of_all_values(
    columns: list[tuple[int, int, bool, bool]], seed: int, ranks: int
) -> None:
    rows = [torch.tensor(row) for row in zip(*columns, strict=True)]
    width, inside, done, replaced = rows
    plan, pending = PackedBins.divide(width, inside, done, replaced, torch.tensor(5))
    column, offset = draw_offsets(width, inside.masked_fill(done, 0), seed)
    owner = torch.randint(ranks, (len(column),), generator=torch.Generator().manual_seed(seed))
    parts = [plan.pack(column[owner == rank], offset[owner == rank]) for rank in range(ranks)]
    counts = plan.unpack(torch.stack([words for _, words in parts]).sum(dim=0))

    assert pending == 5
    assert bool((counts.counts >= 0).all())
    for index, (its_width, values, is_done, _) in enumerate(columns):
        first, last = int(counts.first[index]), int(counts.last[index])
        if is_done:
            assert int(plan.bins[index]) == 0
            continue
        bins = last - first + 1
        assert bins == int(plan.bins[index]) <= its_width
        offsets = offset[column == index]
        if values == 1:
            assert int(counts.lone[index]) == int(offsets[0])
            assert int(counts.counts[first : last + 1].sum()) == 1
            continue
        expected = torch.bincount(offsets * bins // its_width, minlength=bins)
        assert torch.equal(counts.counts[first : last + 1], expected)
        assert int(counts.below[last + 1] - counts.below[first]) == values


def test_bins_of_a_count_use_as_many_bits_as_the_fullest_bracket_needs() -> None:
    none = torch.tensor([False, False])
    for most, bits in ((2, 2), (3, 2), (4, 3), ((1 << 31) - 1, 31)):
        width, inside = torch.tensor([1 << 20, 1 << 20]), torch.tensor([most, 2])
        plan, _ = PackedBins.divide(width, inside, none, none, torch.tensor(0))
        assert (plan.bits, plan.bins_per_word) == (bits, 63 // bits)
        assert plan.word_count == packed_bins._LEAST_WORDS


def test_replaced_bracket_has_more_words_than_another() -> None:
    width, inside = torch.full((2,), 1 << 20), torch.full((2,), 1000)
    no, replaced = torch.tensor([False, False]), torch.tensor([False, True])
    plan, _ = PackedBins.divide(width, inside, no, replaced, torch.tensor(0))
    assert int(plan.bins[1]) > 50 * int(plan.bins[0])


def test_packed_bins_docstring_examples_hold() -> None:
    for module in (packed_bins, bracket_search):
        result = doctest.testmod(module)
        assert result.attempted >= 3 and result.failed == 0
