"""Bytes that a rank stores: tensors of the model and the optimizer, and saved activations."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Any], apart_from: Iterable[Any] = ()) -> int:
    """Return the bytes of the distinct storages of `tensors`, except those of `apart_from`."""
    known = {tensor.untyped_storage()._cdata for tensor in apart_from}
    sizes = {
        storage._cdata: storage.nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for storage in [tensor.untyped_storage()]
    }
    return sum(size for key, size in sizes.items() if key not in known)


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    """Yield every tensor of a Megatron optimizer: its parameters and their state."""
    if hasattr(optimizer, "chained_optimizers"):  # part of a distributed Muon too
        for part in optimizer.chained_optimizers:
            yield from optimizer_tensors(part)
    elif (inner := optimizer.optimizer) is not None:
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from inner.state[parameter].values()


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that count the bytes that autograd saves for the backward pass.

    Args:
        parameters: Tensors that are not counted, nor is any view of them.

    Attributes:
        peak: Largest number of bytes saved at once while the hooks were active.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda saved: saved.tensor)
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: dict[int, int] = {}  # saved tensors by storage
        self._bytes = self.peak = 0

    def _pack(self, tensor: Tensor) -> "_SavedTensor":
        return _SavedTensor(tensor.detach(), self)

    def add(self, storage: torch.UntypedStorage, holders: int) -> None:
        """Record that `storage` has one more saved tensor, or with -1 one fewer."""
        key = storage._cdata
        if key in self._own:
            return
        before = self._holders.get(key, 0)
        after = self._holders[key] = before + holders
        if before == 0 or after == 0:
            self._bytes += holders * storage.nbytes()
            self.peak = max(self.peak, self._bytes)
        if after == 0:
            del self._holders[key]


class _SavedTensor:
    """Saved tensor, counted until the autograd graph drops it."""

    def __init__(self, tensor: Tensor, owner: SavedTensors) -> None:
        self.tensor, self.owner = tensor, owner
        owner.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.owner.add(self.tensor.untyped_storage(), -1)
