"""Gathering of the distributed optimizer's state for a checkpoint, one tensor at a time.

Megatron copies the shards of all parameters, gathers them into buffers for the whole model, on
every rank, and clones each parameter's part of them before it is written. In host memory that is
up to nine times the size of the weights in fp32 for every rank. Here a rank without peers hands out
its tensors as they are. On a CPU, where the ranks of a machine share its memory, the first rank
receives one tensor after the other, and the others keep none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import get_args
from torch import Tensor

from megatron_ext.devices import is_cpu_device

_gather_buffers = DistributedOptimizer.get_parameter_state_dp_zero


class _WholeState:
    """State of all parameters of a buffer that is indexed like one tensor of the whole buffer."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}  # by the first element of the parameter

    def __getitem__(self, place: slice) -> Tensor:
        return self.tensors[place.start]


@functools.wraps(_gather_buffers)
def gather_state(
    self: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> Any:
    """Return the state of all parameters on the first data-parallel rank, and None on the others.

    On several GPUs, and for loading, Megatron's function is called. Its tensors lack the padding at
    the end of each bucket, but its caller indexes them with it, and would save shifted values.
    """
    group = self.data_parallel_group
    if empty_data or (group.size() > 1 and not is_cpu_device()):
        gathered = _gather_buffers(self, use_gloo_comm, empty_data, return_on_all_ranks)
        return gathered if empty_data or gathered is None else _index_with_padding(self, gathered)
    result: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(self.gbuf_ranges):
        buffer, [dtype] = self.buffers[number], ranges
        keys = ("param", *self.optimizer_state_keys)
        states = {key: _WholeState() for key in keys}
        for param, (start, end, bucket) in buffer.param_index_map.items():
            shares = _shares(buffer.buckets[bucket], start, end, group.size())
            local: dict[str, Tensor] = {}
            if group.rank() in shares:
                local = self._get_main_param_and_optimizer_states(param)
            for key, state in states.items():
                tensor = _gather(local.get(key), shares, group)
                if tensor is not None:
                    state.tensors[start] = tensor
        result[number] = {dtype: states}
    return result if group.rank() == 0 else None


def _index_with_padding(self: DistributedOptimizer, gathered: dict[Any, Any]) -> dict[Any, Any]:
    """Return gathered state that is indexed by the places of parameters in padded buckets."""
    for number, ranges in enumerate(self.gbuf_ranges):
        buffer, [dtype] = self.buffers[number], ranges
        paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        tensors = gathered[number][dtype]
        for key in ("param", *self.optimizer_state_keys):
            state = _WholeState()
            for start, end, bucket in buffer.param_index_map.values():
                shift = sum(paddings[:bucket])
                state.tensors[start] = tensors[key][start - shift : end - shift]
            tensors[key] = state
    return gathered


def _shares(bucket: Any, start: int, end: int, size: int) -> dict[int, int]:
    """Return how many elements of a parameter each rank has, which together are all of it.

    Args:
        bucket: Part of the buffer of gradients that the ranks divide equally.
        start: First element of the parameter in the buffer.
        end: Element after its last one.
        size: Number of ranks.
    """
    part = bucket.grad_data.numel() // size
    shares = {}
    for rank in range(size):
        first = bucket.offset + rank * part
        length = min(end, first + part) - max(start, first)
        if length > 0:
            shares[rank] = length
    return shares


def _gather(
    local: Tensor | None, shares: dict[int, int], group: dist.ProcessGroup
) -> Tensor | None:
    """Return a parameter's state in fp32, flat, on the first rank of a group, else None.

    Args:
        local: This rank's share of it, or None.
        shares: Number of elements of each rank that has a share.
        group: The ranks.
    """
    if local is not None:
        local = local.detach().flatten().float()
    if list(shares) == [0]:
        if group.rank() > 0 or local is None:
            return None
        # Training changes the tensor during an asynchronous save.
        return local.clone() if get_args().async_save else local
    if group.rank() > 0:
        if local is not None:
            dist.send(local, group=group, group_dst=0)
        return None
    state = torch.empty(sum(shares.values()), dtype=torch.float32)
    for rank, part in zip(shares, state.split(list(shares.values())), strict=True):
        if rank == 0:
            assert local is not None
            part.copy_(local)
        else:
            dist.recv(part, group=group, group_src=rank)
    return state


def replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacement of Megatron's function that gathers the optimizer's state."""
    optimizer = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    return {f"{optimizer}.get_parameter_state_dp_zero": gather_state}
