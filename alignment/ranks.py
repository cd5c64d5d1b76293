"""What ranks tell each other beside training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from alignment.engines.protocol import AlignmentEngine
from megatron_ext.errors import UserError


def all_reduce_max(count: int) -> int:
    """The largest count of any rank."""
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(count, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def all_gather_by_data_rank(engine: AlignmentEngine, value: Any) -> list[Any]:
    """What each share of the data gives, `[data_size]`, on every rank; ranks of one share agree."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (engine.data_rank, value))
    by_rank = dict(reversed(found))
    return [by_rank[rank] for rank in range(engine.data_size)]


def gather_by_data_rank(engine: AlignmentEngine, value: Any) -> list[Any]:
    """Return what each share of the data gives on rank 0, `[data_size]`; nothing on the others.

    What one rank alone uses, such as the texts of a step, then crosses the network once and not
    once for every rank. A collective.
    """
    first = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((engine.data_rank, value), values if first else None, dst=0)
    by_rank = dict(reversed(values)) if first else {}
    return [by_rank[rank] for rank in range(engine.data_size)] if first else []


def map_over_data_ranks[T, R](
    engine: AlignmentEngine, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]
) -> list[R]:
    """What `work` gives for each of the items, in their order, on every rank; each share of the
    data does its part of them."""
    part = items[engine.data_rank :: engine.data_size]
    return interleave(all_gather_by_data_rank(engine, list(work(part))))


def interleave[T](shares: Sequence[Sequence[T]]) -> list[T]:
    """Of all items, whatever the number of ranks: item i is in share i % len(shares)."""
    size = len(shares)
    return [shares[i % size][i // size] for i in range(sum(map(len, shares)))]


def is_share_leader(engine: AlignmentEngine) -> bool:
    """Whether this is the first of the ranks that hold this rank's share of the data."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, engine.data_rank)
    return found.index(engine.data_rank) == dist.get_rank()


def raise_on_all_ranks(check: Callable[[], None]) -> None:
    """Go on only when `check` raises no UserError on any rank; a collective.

    A rank that raised alone would leave the others waiting for it in the next collective.

    Args:
        check: what this rank looks at or does; has no collectives.

    Raises:
        UserError: That of the first rank that has one, on every rank.
    """
    problem: UserError | None = None
    try:
        check()
    except UserError as error:
        problem = error
    problems: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # whole, as its kind decides the exit status
    for first in problems:
        if first is not None:
            raise first
