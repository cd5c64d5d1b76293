"""Counter of the tensors that a rank passes to `torch.distributed`, for tests and benchmarks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist


@dataclass
class Collectives:
    """Collectives of one rank since counting began.

    Attributes:
        calls: names of the functions, in order.
        payload: bytes of the tensors this rank handed in.
        sent: bytes this rank sends where collectives go around a ring: an all-reduce passes on
            2 (R - 1) / R of its tensor, an all-gather R - 1 times its own part.
    """

    calls: list[str] = field(default_factory=list)
    payload: int = 0
    sent: float = 0.0

    def add(self, name: str, nbytes: int, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_world_size(group)
        self.calls.append(name)
        self.payload += nbytes
        self.sent += nbytes * (2 * (ranks - 1) / ranks if name == "all_reduce" else ranks - 1)


_OWN_PART = {  # the argument with what this rank contributes
    "all_reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,  # from torch 2.13 on
}
_NOT_COUNTED = ("broadcast", "reduce", "reduce_scatter_tensor", "all_to_all_single", "barrier")


@contextmanager
def counted_collectives() -> Iterator[Collectives]:
    """Count calls of `torch.distributed` in the context; unknown functions are errors."""
    counted = Collectives()

    def counting(name: str, position: int) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            own = args[position]
            counted.add(name, own.numel() * own.element_size(), kwargs.get("group"))
            return function(*args, **kwargs)

        return call

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a collective that is not counted")

    with ExitStack() as stack:
        for name, position in _OWN_PART.items():
            if not hasattr(dist, name):
                continue
            stack.enter_context(mock.patch.object(dist, name, counting(name, position)))
        for name in _NOT_COUNTED:
            stack.enter_context(mock.patch.object(dist, name, refuse))
        yield counted
