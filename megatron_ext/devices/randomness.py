"""Separate random states of host and device on the CPU, where torch has one generator.

Megatron separates them: parameters and dropout draw from the device's state, which its tracker
forks per parallel rank; data loading draws from the host's. On the CPU every tensor operation
draws from torch's one default generator, so that generator becomes the *device's*, and
`torch.get_rng_state`, `torch.set_rng_state` and `torch.seed`, which mean the host, use a separate
generator; `torch.manual_seed` seeds both, as it does with CUDA.

Data loaders draw on the host without naming a generator, so they run with the host's state
swapped in. Otherwise a loader that exists on the first tensor-parallel rank alone would make the
dropout of that rank differ from that of its peers.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.data import dataloader

_device_generator = torch.random.default_generator
_host_generator = torch.Generator()


@contextmanager
def drawing_on_host() -> Iterator[None]:
    """Let torch operations draw from the host's random state, for the duration of a block."""
    device_state = _device_generator.get_state()
    _device_generator.set_state(_host_generator.get_state())
    try:
        yield
    finally:
        _host_generator.set_state(_device_generator.get_state())
        _device_generator.set_state(device_state)


def _draws_on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to draw from the host's random state."""

    @functools.wraps(function)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        with drawing_on_host():
            return function(*args, **kwargs)

    return swapped


def _device_states(*args: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Return the device and its random state for `torch.utils.checkpoint`.

    It would look for devices among its arguments, which are on the CPU.
    """
    return [0], [_device_generator.get_state()]


def replacements() -> dict[str, Any]:
    """Create equal random states of host and device, and return the replacements."""
    _host_generator.set_state(_device_generator.get_state())
    torch.utils.checkpoint.DefaultDeviceType.set_device_type("cuda")
    loader, iterator = dataloader.DataLoader, dataloader._BaseDataLoaderIter
    return {
        "torch.cuda.default_generators": (_device_generator,),
        "torch.random.default_generator": _host_generator,
        "torch.default_generator": _host_generator,
        "torch.utils.checkpoint.get_device_states": _device_states,
        "torch.utils.data.dataloader.DataLoader.__iter__": _draws_on_host(loader.__iter__),
        "torch.utils.data.dataloader._BaseDataLoaderIter.__next__": _draws_on_host(
            iterator.__next__
        ),
    }
