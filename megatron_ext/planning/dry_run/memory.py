"""Bytes that a rank stores: model and optimizer, saved activations, and all tensors of a step."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass
class RankMemory:
    """Bytes that a rank stores in a step.

    Attributes:
        parameters: Weights, with the padding of Megatron's buffers.
        gradients: Buffers in which gradients are accumulated and reduced.
        optimizer: Main parameters, where they are not the weights themselves, and their state.
        activations: Largest number of bytes saved for the backward pass at once.
        temporary: Bytes of all other tensors of the forward and backward pass, such as gradients of
            activations, at the moment at which most are stored.
        router_logits: Logits stored for the cutoffs at the end of the step.
        gather_buffer: Buffer into which sequence parallelism gathers activations.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0
    router_logits: int = 0
    gather_buffer: int = 0


def storage_bytes(tensors: Iterable[Any], apart_from: Iterable[Any] = ()) -> int:
    """Return the bytes of the distinct storages of `tensors`, except those of `apart_from`."""
    excluded = {tensor.untyped_storage()._cdata for tensor in apart_from}
    sizes = {
        storage._cdata: storage.nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for storage in [tensor.untyped_storage()]
    }
    return sum(size for key, size in sizes.items() if key not in excluded)


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


class LiveTensors:
    """Counter of the bytes of all meta tensors that a step creates and has not freed.

    Tensors that exist before the step, such as weights, do not count, nor does any view of them.

    Args:
        vocabulary: Rows of the vocabulary on this rank. Tensors whose last dimension has as many
            elements are logits.

    Attributes:
        peak: Largest number of bytes at once.
        logits: Those of them that belonged to logits.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        self.peak = self.logits = 0
        self._vocabulary = vocabulary
        self._bytes = self._logits = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def record(self, arguments: Any, results: Any) -> None:
        """Count the tensors that an operation creates.

        Args:
            arguments: Arguments of the operation, in any nesting.
            results: Its results, in any nesting.
        """
        for tensor in _meta_tensors(arguments):
            self._add(tensor, counts=False)
        for tensor in _meta_tensors(results):
            self._add(tensor, counts=True)
        if self._bytes > self.peak:
            self.peak, self.logits = self._bytes, self._logits

    def begin_phase(self) -> tuple[int, int]:
        """Return the peak so far and its logits, and reset both for another phase."""
        before = self.peak, self.logits
        self.peak, self.logits = self._bytes, self._logits
        return before

    def _add(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if counts else 0
        is_logits = self._vocabulary > 0 and tensor.shape[-1:] == (self._vocabulary,)
        logits = size if is_logits and tensor.dim() > 1 else 0

        def free(_: Any) -> None:
            del self._storages[key]
            self._bytes -= size
            self._logits -= logits

        self._storages[key] = weakref.ref(storage, free)
        self._bytes += size
        self._logits += logits


def _meta_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the meta tensors in nested values."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.is_meta:
            yield value
