"""Collectives for plain Python values, over the shares of the data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from alignment.engines.protocol import AlignmentEngine
from megatron_ext.errors import UserError


def all_reduce_max(count: int) -> int:
    """Return the largest count of all ranks; a collective."""
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(count, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def all_gather_by_data_rank(engine: AlignmentEngine, value: Any) -> list[Any]:
    """Return the values of all data ranks, `[data_size]`, on every rank; a collective.

    Ranks with the same data rank pass the same value.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, (engine.data_rank, value))
    by_rank = dict(reversed(values))
    return [by_rank[rank] for rank in range(engine.data_size)]


def gather_by_data_rank(engine: AlignmentEngine, value: Any) -> list[Any]:
    """Return the values of all data ranks on rank 0, `[data_size]`, and nothing on the others.

    Values that one rank alone uses, such as the texts of a step, cross the network once and not
    once for every rank. A collective.
    """
    first = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((engine.data_rank, value), values if first else None, dst=0)
    by_rank = dict(reversed(values)) if first else {}
    return [by_rank[rank] for rank in range(engine.data_size)] if first else []


def on_first_rank[T](function: Callable[[], T]) -> T:
    """Return on every rank what a function returns on rank 0; a collective.

    Args:
        function: Function without collectives, which only rank 0 calls.

    Raises:
        UserError: The error that the function raises, on all ranks.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def map_over_data_ranks[T, R](
    engine: AlignmentEngine, items: Sequence[T], function: Callable[[Sequence[T]], Sequence[R]]
) -> list[R]:
    """Return the results of all items in their order, on every rank; a collective.

    Args:
        engine: Engine whose data ranks divide the items among them.
        items: All items, the same on every rank.
        function: Function that returns the results of some of the items.
    """
    part = items[engine.data_rank :: engine.data_size]
    return interleave(all_gather_by_data_rank(engine, list(function(part))))


def interleave[T](shares: Sequence[Sequence[T]]) -> list[T]:
    """Return all items in their order, where item i is in share i % len(shares)."""
    size = len(shares)
    return [shares[i % size][i // size] for i in range(sum(map(len, shares)))]


def is_share_leader(engine: AlignmentEngine) -> bool:
    """Return whether this is the first of the ranks with its data rank; a collective."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, engine.data_rank)
    return ranks.index(engine.data_rank) == dist.get_rank()


def raise_on_all_ranks(check: Callable[[], None]) -> None:
    """Run a check, and raise its error on all ranks; a collective.

    A rank that raised alone would leave the others waiting in the next collective.

    Args:
        check: Function without collectives, which may raise a UserError.

    Raises:
        UserError: The error of the first rank that has one.
    """
    problem: UserError | None = None
    try:
        check()
    except UserError as error:
        problem = error
    problems: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # the error itself: its class sets the exit status
    for first in problems:
        if first is not None:
            raise first
