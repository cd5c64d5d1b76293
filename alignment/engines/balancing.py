"""Packing of a step's samples into rows, balanced by tokens over data-parallel ranks and rows."""

from collections.abc import Sequence

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import all_gather_by_data_rank, all_reduce_max


def pack(engine: AlignmentEngine, samples: Sequence[TokenSample], length: int) -> TokenBatch:
    """Pack samples into rows, balanced by tokens over ranks and rows; a collective.

    Rows of all ranks are equally long.
    """
    batch = TokenBatch.balanced(balance_over_ranks(engine, samples), length)
    return batch.padded(batch.rows, all_reduce_max(batch.length))


def balance_over_ranks(
    engine: AlignmentEngine, samples: Sequence[TokenSample]
) -> list[TokenSample]:
    """Move samples from ranks with many tokens to ranks with few; a collective.

    Only samples that move cross the network. The loss of a step does not depend on which rank has a
    sample, as it is normalized over all ranks.
    """
    sizes = all_gather_by_data_rank(engine, [len(sample.tokens) for sample in samples])
    moves = plan_moves(sizes)
    leaving = {place: target for source, place, target in moves if source == engine.data_rank}
    if not moves:
        return list(samples)
    outgoing = [(leaving[place], samples[place]) for place in sorted(leaving)]
    arrived = [
        sample
        for share in all_gather_by_data_rank(engine, outgoing)
        for target, sample in share
        if target == engine.data_rank
    ]
    return [sample for place, sample in enumerate(samples) if place not in leaving] + arrived


def plan_moves(sizes: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return moves that lower the number of tokens of the fullest rank.

    The fullest rank passes its largest sample that lowers the maximum to the emptiest rank, until
    no sample does.

    Args:
        sizes: Tokens of the samples of each rank.

    Returns:
        Rank, index of the sample among the rank's samples, and destination rank.
    """
    totals = [sum(rank) for rank in sizes]
    left = [dict(enumerate(rank)) for rank in sizes]
    moves: list[tuple[int, int, int]] = []
    while True:
        source = max(range(len(totals)), key=totals.__getitem__)
        target = min(range(len(totals)), key=totals.__getitem__)
        gap = totals[source] - totals[target]
        fitting = [(size, -place) for place, size in left[source].items() if 0 < size < gap]
        if not fitting:
            return moves
        # The best move halves the gap between the two ranks.
        size, place = min(fitting, key=lambda one: (abs(gap - 2 * one[0]), one))
        moves.append((source, -place, target))
        del left[source][-place]
        totals[source] -= size
        totals[target] += size
