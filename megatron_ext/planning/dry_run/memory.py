"""Bytes that a rank holds: what the model and the optimizer own, and what waits for backward."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Any], apart_from: Iterable[Any] = ()) -> int:
    """Bytes of the distinct storages behind `tensors`, without those behind `apart_from`."""
    known = {tensor.untyped_storage()._cdata for tensor in apart_from}
    sizes = {
        storage._cdata: storage.nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for storage in [tensor.untyped_storage()]
    }
    return sum(size for key, size in sizes.items() if key not in known)


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    """Every tensor of a Megatron optimizer: the parameters it steps and the state it keeps."""
    if hasattr(optimizer, "chained_optimizers"):  # Muon's part of a distributed one is a chain too
        for part in optimizer.chained_optimizers:
            yield from optimizer_tensors(part)
    elif (inner := optimizer.optimizer) is not None:
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from inner.state[parameter].values()


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Follows the bytes that autograd keeps for the backward pass.

    Args:
        parameters: their storages, and any view of them, are not counted.

    Attributes:
        peak: the most bytes kept at once while this was active.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda held: held.tensor)
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: dict[int, int] = {}  # storage: how many saved tensors share it
        self._bytes = self.peak = 0

    def _pack(self, tensor: Tensor) -> "_Held":
        return _Held(tensor.detach(), self)

    def add(self, storage: torch.UntypedStorage, holders: int) -> None:
        """One more, or with -1 one less, saved tensor lives in `storage`."""
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


class _Held:
    """A saved tensor; the graph drops it when it needs it no longer."""

    def __init__(self, tensor: Tensor, owner: SavedTensors) -> None:
        self.tensor, self.owner = tensor, owner
        owner.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.owner.add(self.tensor.untyped_storage(), -1)
