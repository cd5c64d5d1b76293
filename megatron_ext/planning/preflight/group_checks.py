"""Checks of the collectives over the groups of a layout: results and bandwidth."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.errors import UserError
from megatron_ext.planning.preflight.findings import OK, WARNING, CheckResult
from megatron_ext.training.launch import Launch

# Groups as Megatron lays them out. Gradients are reduced over the last two.
KINDS: dict[str, Callable[[], Any]] = {
    "tensor parallel": parallel_state.get_tensor_model_parallel_group,
    "context parallel": parallel_state.get_context_parallel_group,
    "expert parallel": parallel_state.get_expert_model_parallel_group,
    "pipeline parallel": parallel_state.get_pipeline_model_parallel_group,
    "data parallel": partial(parallel_state.get_data_parallel_group, with_context_parallel=True),
    "expert data parallel": parallel_state.get_expert_data_parallel_group,
}
OPERATIONS = ("all-reduce", "all-to-all")
_ROUNDS = 5


def kinds() -> Iterator[tuple[str, Any]]:
    """Yield the kind and the group of each of this rank's groups of more than one rank."""
    for kind, group in KINDS.items():
        if group().size() > 1:
            yield kind, group()


def seconds_of(operation: str, group: Any, size: int) -> float:
    """Run a collective, check its result, and return the mean seconds of a call.

    Args:
        operation: One of `OPERATIONS`.
        group: Process group.
        size: Bytes of the tensor on each rank.

    Raises:
        UserError: The collective fails, does not end in time, or its result is wrong.
    """
    members = dist.get_process_group_ranks(group)
    try:
        return _all_reduce(group, size) if operation == "all-reduce" else _all_to_all(group, size)
    except _WrongResult:
        raise UserError(
            f"{operation} over ranks {_names(members)} gives wrong results. Check the cables "
            "and drivers of their nodes."
        ) from None
    except RuntimeError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{operation} over ranks {_names(members)} fails ({reason}). Check that these nodes "
            "reach each other over INTERFACE, and NCCL_DEBUG=INFO."
        ) from error


class _WrongResult(Exception):
    """Wrong result of a collective."""


def _all_reduce(group: Any, size: int) -> float:
    """Check the result of an all-reduce, and return the mean seconds of a call."""
    ranks, rank = group.size(), group.rank()
    x = torch.full((size // 4,), float(rank + 1), device="cuda")
    _wait(dist.all_reduce(x, group=group, async_op=True))
    if not bool((x == ranks * (ranks + 1) // 2).all()):
        raise _WrongResult
    return _time(lambda: dist.all_reduce(x, group=group, async_op=True), group)


def _all_to_all(group: Any, size: int) -> float:
    """Check the result of an all-to-all, and return the mean seconds of a call."""
    ranks, rank = group.size(), group.rank()
    part = max(1, size // 4 // ranks)
    x = torch.arange(ranks, device="cuda").repeat_interleave(part) + 1000.0 * rank
    y = torch.empty_like(x)  # receives 1000 i + this rank from rank i
    _wait(dist.all_to_all_single(y, x, group=group, async_op=True))
    expected = 1000.0 * torch.arange(ranks, device="cuda").repeat_interleave(part) + rank
    if not torch.equal(y, expected):
        raise _WrongResult
    return _time(lambda: dist.all_to_all_single(y, x, group=group, async_op=True), group)


def _time(start: Callable[[], Any], group: Any) -> float:
    """Return the mean seconds of a collective, started on all ranks at once."""
    _wait(dist.all_reduce(torch.zeros(1, device="cuda"), group=group, async_op=True))
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        _wait(start())
    return (time.perf_counter() - begin) / _ROUNDS


def _wait(work: Any) -> None:
    """Wait for a collective, on the host too."""
    work.wait()
    torch.cuda.synchronize()


def bandwidths(
    launch: Launch, kind: str, group: Any, seconds: dict[str, float], size: int
) -> list[dict[str, Any]]:
    """Return the bandwidth of every group of a kind.

    Bytes are those that pass a rank's link, as nccl-tests counts its bus bandwidth.

    Args:
        launch: Ranks of the launch.
        kind: Kind of the groups.
        group: This rank's group of the kind.
        seconds: Seconds of a call on this rank, by operation.
        size: Bytes of the tensor on each rank.

    Returns:
        For each group its ranks and, by operation, the bytes per second of its slowest rank.
    """
    ranks = dist.get_process_group_ranks(group)
    slowest_ranks: dict[tuple[int, ...], dict[str, float]] = {}
    for row in launch.gather(f"{kind} seconds", {"ranks": ranks, "seconds": seconds}):
        slowest = slowest_ranks.setdefault(tuple(row["ranks"]), {})
        for operation, value in row["seconds"].items():
            slowest[operation] = max(value, slowest.get(operation, 0.0))
    n = len(ranks)
    passing = {"all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    return [
        {"ranks": list(members), **{o: size * passing[o] / slowest[o] for o in OPERATIONS}}
        for members, slowest in sorted(slowest_ranks.items())
    ]


def in_words(groups: list[dict[str, Any]]) -> CheckResult:
    """Return the bandwidth of the slowest group as the result of a check.

    It is a warning if that group is less than half as fast as the median.
    """
    message, slow = [], []
    for operation in OPERATIONS:
        speeds = [group[operation] for group in groups]
        worst = min(groups, key=lambda group: group[operation])
        message.append(f"{operation} {min(speeds) / 1e9:,.3g} GB/s")
        if worst[operation] < statistics.median_high(speeds) / 2:
            slow.append(
                f"{operation} over ranks {_names(worst['ranks'])} is slow, the median is "
                f"{statistics.median_high(speeds) / 1e9:,.3g} GB/s: check the links of their "
                "nodes, or leave a node out"
            )
    ranks = len(groups[0]["ranks"])
    count = f"{len(groups)} group{'s' if len(groups) > 1 else ''} of {ranks} ranks"
    text = "; ".join([f"{count}, {', '.join(message)}", *slow])
    return CheckResult(text, WARNING if slow else OK, {"groups": groups})


def _names(members: list[int]) -> str:
    """Return the numbers of ranks, at most eight, in words."""
    ranks = " ".join(map(str, members[:8]))
    return ranks + (" ..." if len(members) > 8 else "")


def meet(args: Any, launch: Launch) -> CheckResult:
    """Create the process groups of the run with Megatron's own code.

    Raises:
        UserError: The ranks cannot reach each other.
    """
    from megatron.training.initialize import _initialize_distributed

    # With this setting a hang of NCCL raises an error here instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    args.distributed_timeout_minutes = launch.timeout / 60
    try:
        _initialize_distributed(None, None, launch.store)
    except RuntimeError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"Ranks cannot make their groups ({reason}). Check that the nodes reach each other "
            "over INTERFACE, and NCCL_DEBUG=INFO."
        ) from error
    return CheckResult(f"{args.distributed_backend} connects all {dist.get_world_size()} ranks")


def measure(launch: Launch, kind: str, group: Any, size: int) -> CheckResult:
    """Time collectives of `size` bytes over all groups of a kind.

    Raises:
        UserError: A collective fails or its result is wrong, see :func:`seconds_of`.
    """
    seconds = {operation: seconds_of(operation, group, size) for operation in OPERATIONS}
    return in_words(bandwidths(launch, kind, group, seconds, size))
