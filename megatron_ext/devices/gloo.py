"""Collectives with arguments that Megatron uses and gloo refuses."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_all_to_all_single = dist.all_to_all_single
_all_gather = dist.all_gather


class AllDone:
    """Handle of several collectives that together replace one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> bool:
        """Wait for all collectives."""
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        """Return whether all collectives are completed."""
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
    """Exchange tensors between all ranks, with split sizes that may be tensors.

    Megatron's dispatcher converts split sizes to arrays when it copies them off the GPU. On the
    CPU it has nothing to copy and passes tensors, which torch refuses.
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
    """Gather tensors, of unequal shapes by one broadcast per rank.

    Layer-wise optimizers gather tensors of unequal shapes.
    """
    equal_shapes = len({part.shape for part in tensor_list}) <= 1
    if equal_shapes or dist.get_backend(group) != "gloo":
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
