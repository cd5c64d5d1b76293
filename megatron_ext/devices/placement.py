"""Where tensors go: "cuda" means host memory.

The torch functions and Tensor methods that take a device are wrapped one by one. A global
`TorchFunctionMode` would do it in fewer lines and tax every operation
(`benchmarks/cpu_device.py` measures both).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils import _device as device_context

# Where "cuda" is: host memory, or the meta device inside `without_data`.
_device = torch.device("cpu")

FACTORIES = (
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_like",
    "empty_permuted", "empty_strided", "eye", "full", "full_like", "hamming_window", "hann_window",
    "kaiser_window", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor",
    "sparse_compressed_tensor", "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices",
    "zeros", "zeros_like",
)  # fmt: skip
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


@contextmanager
def without_data() -> Iterator[None]:
    """Let "cuda" mean the meta device inside: tensors placed there have a shape and no data."""
    global _device
    _device = torch.device("meta")
    try:
        yield
    finally:
        _device = torch.device("cpu")


def on_host(device: Any) -> Any:
    """The device a tensor is placed on: the CPU (or meta) for any spelling of a CUDA device.

    An integer is a CUDA device to torch. What is no device comes back unchanged.
    """
    if isinstance(device, torch.device):
        return _device if device.type == "cuda" else device
    if isinstance(device, str):
        return _device if device.startswith("cuda") else device
    return _device if isinstance(device, int) else device


def _placed_on_host(function: Callable[..., Any]) -> Callable[..., Any]:
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
    if args:
        args = (on_host(args[0]), *args[1:])
    elif "device" in kwargs:
        kwargs["device"] = on_host(kwargs["device"])
    return _to(self, *args, **kwargs)


def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Name the type CUDA would give: Megatron's optimizers sort parameters by it."""
    if dtype is None:
        # Under a TorchFunctionMode the original calls this function again.
        name = _type(self).removeprefix("torch.cuda.").removeprefix("torch.")
        on_device = self.device.type in ("cpu", "meta")
        return f"torch.cuda.{name.removeprefix('meta.')}" if on_device else f"torch.{name}"
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return _type(self, dtype, *args, **kwargs)


def _itself(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


def _record_stream(self: torch.Tensor, stream: Any) -> None:
    pass


def _enter_on_host(self: device_context.DeviceContext, device: Any) -> None:
    _enter_device(self, on_host(torch.device(device)))


def _stay_on_host(storage: Any, location: str) -> Any:
    """For `torch.load`: a storage saved on a GPU is used where it was read, in host memory."""
    return storage if location.startswith("cuda") else None


def install() -> None:
    """Wrap what takes a device."""
    # `with torch.device(...)` recognises factories by identity: let it collect the originals.
    device_context._device_constructors()
    replacements: dict[str, Callable[..., Any]] = {
        **{name: _placed_on_host(getattr(torch.Tensor, name)) for name in METHODS},
        "to": tensor_to,
        "type": tensor_type,
        "cuda": _itself,
        "pin_memory": _itself,
        "record_stream": _record_stream,
    }
    for name, method in replacements.items():
        setattr(torch.Tensor, name, method)
    for name in FACTORIES:
        original = getattr(torch, name)
        factory = _placed_on_host(original)
        setattr(torch, name, factory)
        # `torch.jit.script` recognises operators by identity.
        if operator := _builtins._find_builtin(original):
            _builtins._register_builtin(factory, operator)
    device_context.DeviceContext.__init__ = _enter_on_host  # type: ignore[method-assign]
    torch.serialization.register_package(0, lambda storage: None, _stay_on_host)
