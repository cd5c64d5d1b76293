"""Placement of tensors on the CPU device, where "cuda" means host memory.

The torch functions and Tensor methods that take a device are wrapped one by one. A global
`TorchFunctionMode` would need fewer lines but slow down every operation
(`benchmarks/cpu_device.py` measures both).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils import _device as device_context

from megatron_ext.patches.table import FACTORIES, METHODS

# Device that "cuda" means: host memory, or the meta device inside `without_data`.
_device = torch.device("cpu")


@contextmanager
def without_data() -> Iterator[None]:
    """Let "cuda" mean the meta device, whose tensors have no data, for the duration of a block."""
    global _device
    _device = torch.device("meta")
    try:
        yield
    finally:
        _device = torch.device("cpu")


def on_host(device: Any) -> Any:
    """Return the device on which a tensor is placed: the CPU or meta device instead of CUDA.

    An integer is a CUDA device to torch. Other devices, and arguments that are not devices, are
    returned unchanged.
    """
    if isinstance(device, torch.device):
        return _device if device.type == "cuda" else device
    if isinstance(device, str):
        return _device if device.startswith("cuda") else device
    return _device if isinstance(device, int) else device


def _placed_on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that creates a tensor, to place it on the host instead of on CUDA."""

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_host(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return factory


_to = torch.Tensor.to
_type = torch.Tensor.type
_enter_device = device_context.DeviceContext.__init__


def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace `Tensor.to`, placing tensors on the host instead of on CUDA."""
    if args:
        args = (on_host(args[0]), *args[1:])
    elif "device" in kwargs:
        kwargs["device"] = on_host(kwargs["device"])
    return _to(self, *args, **kwargs)


def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Replace `Tensor.type`, returning the type on CUDA, by which Megatron sorts parameters."""
    if dtype is None:
        # Under a TorchFunctionMode the original calls this function again.
        name = _type(self).removeprefix("torch.cuda.").removeprefix("torch.")
        on_device = self.device.type in ("cpu", "meta")
        return f"torch.cuda.{name.removeprefix('meta.')}" if on_device else f"torch.{name}"
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return _type(self, dtype, *args, **kwargs)


def _itself(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the tensor, as moving it to CUDA and pinning it have no effect."""
    return self


def _record_stream(self: torch.Tensor, stream: Any) -> None:
    """Do nothing: there is only one stream."""


def _enter_on_host(self: device_context.DeviceContext, device: Any) -> None:
    """Replace the constructor of `with torch.device(...)`, using the host instead of CUDA."""
    _enter_device(self, on_host(torch.device(device)))


def _stay_on_host(storage: Any, location: str) -> Any:
    """Let `torch.load` leave a storage that was saved on a GPU in host memory."""
    return storage if location.startswith("cuda") else None


def replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacements of functions that take a device, and register them with torch."""
    # `with torch.device(...)` recognizes factories by identity, so it must collect the originals.
    device_context._device_constructors()
    methods: dict[str, Callable[..., Any]] = {
        **{name: _placed_on_host(getattr(torch.Tensor, name)) for name in METHODS.split()},
        "to": tensor_to,
        "type": tensor_type,
        "cuda": _itself,
        "pin_memory": _itself,
        "record_stream": _record_stream,
    }
    factories = {name: _placed_on_host(getattr(torch, name)) for name in FACTORIES.split()}
    for name, factory in factories.items():
        # `torch.jit.script` recognizes operators by identity.
        if operator := _builtins._find_builtin(getattr(torch, name)):
            _builtins._register_builtin(factory, operator)
    torch.serialization.register_package(0, lambda storage: None, _stay_on_host)
    return {
        **{f"torch.Tensor.{name}": method for name, method in methods.items()},
        **{f"torch.{name}": factory for name, factory in factories.items()},
        "torch.utils._device.DeviceContext.__init__": _enter_on_host,
    }
