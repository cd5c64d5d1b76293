"""Tests of the packing of responses, balanced over ranks and rows, and filtered."""

import random
from typing import Any

import pytest

from alignment.engines.balancing import plan_moves
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.rl.algorithms import ALGORITHMS
from alignment.rl.rollouts import RewardResult, Rollout, RolloutGroup
from alignment.rl.tasks import PromptTask, RLSettings
from megatron_ext.inference.sampling import Sampling
from tests.distributed import run_ranks


def after(sizes, moves):
    """Return the tokens of every rank after the moves; each sample is moved at most once."""
    totals = [sum(rank) for rank in sizes]
    assert len({move[:2] for move in moves}) == len(moves)
    for source, place, target in moves:
        totals[source] -= sizes[source][place]
        totals[target] += sizes[source][place]
    return totals


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_balancing_moves_lower_the_largest_token_count_of_a_rank(ranks):
    draw = random.Random(ranks)
    for _ in range(50):
        sizes = [[draw.randint(1, 90) for _ in range(draw.randint(0, 8))] for _ in range(ranks)]
        totals = after(sizes, plan_moves(sizes))
        assert max(totals) <= max(map(sum, sizes))
        largest = max((size for rank in sizes for size in rank), default=0)
        assert max(totals) - min(totals) <= largest


def test_balancing_of_equal_ranks_moves_nothing():
    assert plan_moves([[96] * 4, [96] * 4]) == []


def test_rows_are_filled_evenly_and_no_longer_than_the_fullest():
    batch = TokenBatch.balanced([TokenSample([1] * size) for size in (5, 5, 5, 5, 5)], 16)
    assert batch.tokens.shape == (2, 15)
    assert sorted((batch.samples[row] >= 0).sum().item() for row in range(2)) == [10, 15]
    tight = TokenBatch.balanced([TokenSample([1] * size) for size in (6, 6, 4, 4, 4)], 12)
    assert tight.tokens.shape == (2, 12)  # even filling would not fit: 6 + 4 + 4


def packed_on(rank_sizes):
    import torch.distributed as dist

    from alignment.rl.mini_batches import mini_batches

    rank, size = dist.get_rank(), dist.get_world_size()
    engine: Any = type("Ranks", (), {"data_rank": rank, "data_size": size})
    settings = RLSettings(
        ALGORITHMS["grpo"], 2, 3, 1, 40, Sampling(8),
        rollout_filter=lambda group: [rollout.sample < 2 for rollout in group.rollouts],
    )  # fmt: skip
    groups = [
        RolloutGroup(
            PromptTask(str(number), [number], None),
            [Rollout(str(number), s, [7 + s] * length, [0.0] * length, True) for s in range(3)],
            [RewardResult(float(s), "score") for s in range(3)],
        )
        for number, length in rank_sizes
    ][rank::size]
    [batch] = mini_batches(engine, settings, groups, (0, 0))
    tokens = batch.tokens[batch.loss_mask].tolist()
    return sorted(tokens), batch.length, sorted(set(batch.extras["advantage"].flatten().tolist()))


def test_responses_move_to_balance_ranks_and_the_filter_leaves_some_out():
    groups = [(0, 16), (1, 4)]
    [(alone, _, advantages)] = run_ranks(packed_on, 1, groups)
    first, second = run_ranks(packed_on, 2, groups)
    assert sorted(first[0] + second[0]) == alone == [7] * 20 + [8] * 20
    assert abs(len(first[0]) - len(second[0])) <= 8 and first[1] == second[1]
    # Of the rewards 0 and 1 alone: the third response is in no statistics.
    expected = 0.5 / 0.5**0.5
    assert [a for a in advantages if a] == pytest.approx([-expected, expected])
