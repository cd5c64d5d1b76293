"""Counts of what a real rank holds and sends, independent of the code that predicts them."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counted(TorchDispatchMode):
    """Bytes of every collective that torch dispatches, by (operation, group)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        c10d = torch.ops.c10d
        # operation: name, argument whose bytes count, argument that is the group
        table = {
            c10d.allreduce_.default: ("all-reduce", 0, 1),
            c10d.allreduce_coalesced_.default: ("all-reduce", 0, 1),
            c10d._allgather_base_.default: ("all-gather", 0, 2),
            c10d.allgather_.default: ("all-gather", 0, 2),
            c10d.allgather_into_tensor_coalesced_.default: ("all-gather", 0, 2),
            c10d._reduce_scatter_base_.default: ("reduce-scatter", 1, 2),
            c10d.reduce_scatter_.default: ("reduce-scatter", 1, 2),
            c10d.reduce_scatter_tensor_coalesced_.default: ("reduce-scatter", 1, 2),
            c10d.alltoall_base_.default: ("all-to-all", 1, 2),
            c10d.broadcast_.default: ("broadcast", 0, 1),
            c10d.send.default: ("send", 0, 1),
            c10d.recv_.default: ("receive", 0, 1),
        }
        if func.namespace == "c10d" and func is not c10d.barrier.default:
            name, counted, index = table[func]
            group = dist.ProcessGroup.unbox(args[index])
            if group.size() > 1:
                leaves = tree_leaves(args[counted])
                size = sum(t.numel() * t.element_size() for t in leaves)
                self.bytes[name, group.group_desc] += size
        return func(*args, **(kwargs or {}))


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages that autograd saves, without parameters."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._alive: dict[int, torch.Tensor] = {}  # references, so that no address is reused

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        detached = tensor.detach()
        if detached.untyped_storage().data_ptr() not in self._own:
            self._alive[detached.untyped_storage().data_ptr()] = detached
        return detached

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._alive.values())


def nbytes(tensors: list[torch.Tensor], apart_from: frozenset[int] = frozenset()) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in apart_from)


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain, and of chains in it."""
    if not hasattr(optimizer, "chained_optimizers"):
        return [optimizer]
    return [part for link in optimizer.chained_optimizers for part in _parts(link)]


def owned(model: Any, optimizer: Any) -> dict[str, int]:
    """Return the bytes that a rank holds after a step, and its number of parameters."""
    from megatron.core.parallel_state import get_global_memory_buffer

    weights = [p for chunk in model for p in chunk.parameters()]
    parts = _parts(optimizer)
    groups = [g for part in parts for g in part.optimizer.param_groups]
    stepped = [p for group in groups for p in group["params"]]
    state = [
        value
        for part in parts
        for values in part.optimizer.state.values()
        for value in values.values()
    ]
    addresses = frozenset(p.untyped_storage().data_ptr() for p in weights)
    return {
        "held": sum(p.numel() for p in weights),
        "parameters": nbytes(weights),
        "gather_buffer": nbytes(list(get_global_memory_buffer().buffer.values())),
        "gradients": nbytes([p.main_grad for p in weights]),
        "optimizer": nbytes([*stepped, *state], apart_from=addresses),
    }
