"""Collectives in the forms that Megatron uses and gloo refuses."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_all_to_all_single = dist.all_to_all_single
_all_gather = dist.all_gather


class AllDone:
    """One handle for the several collectives that stand for one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> bool:
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


@functools.wraps(_all_to_all_single)
def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Accept split sizes as tensors.

    Megatron's dispatcher turns them into arrays as it copies them off the GPU. On the CPU it has
    nothing to copy and passes them as they are, which torch refuses.
    """
    output_splits, input_splits = (
        sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        for sizes in (output_split_sizes, input_split_sizes)
    )
    return _all_to_all_single(output, input, output_splits, input_splits, group, async_op)


@functools.wraps(_all_gather)
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Gather tensors of unequal shapes, as layer-wise optimizers do, by one broadcast a rank."""
    alike = len({part.shape for part in tensor_list}) <= 1
    if alike or dist.get_backend(group) != "gloo":
        return _all_gather(tensor_list, tensor, group, async_op)
    tensor_list[dist.get_rank(group)].copy_(tensor)
    gathering = AllDone(
        [
            dist.broadcast(part, group=group, group_src=rank, async_op=True)
            for rank, part in enumerate(tensor_list)
        ]
    )
    if async_op:
        return gathering
    gathering.wait()
    return None


def all_gather_replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacements of `all_gather`."""
    return {
        "torch.distributed.all_gather": all_gather,
        "torch.distributed.distributed_c10d.all_gather": all_gather,
    }


def all_to_all_replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacements of `all_to_all_single`."""
    return {
        "torch.distributed.all_to_all_single": all_to_all_single,
        "torch.distributed.distributed_c10d.all_to_all_single": all_to_all_single,
    }
