"""CPU device, on which Megatron's trainer runs over gloo on a machine without CUDA.

Megatron uses `torch.cuda` for its device, streams, memory and random state, and places tensors on
"cuda". The CPU device replaces these functions and places those tensors in host memory, so that
Megatron's code runs unchanged. Each concern has a file: `runtime` (functions of `torch.cuda`),
`placement` (devices of tensors), `randomness` (two random states on one generator) and `gloo`
(collectives that gloo lacks).
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_ext import patches

_device: str | None = None


def activate(use_cuda: bool = True) -> str:
    """Choose the device on which Megatron runs, once, and return it: "cuda" or "cpu".

    With CUDA available, and unless `use_cuda` is False, torch is not changed. Otherwise the CPU
    device is installed, which must happen before Megatron is imported, because its modules keep
    references to torch functions.
    On either device the patches of the group "megatron" are applied. Later calls return the first
    choice.

    Args:
        use_cuda: Whether to use CUDA if it is available.

    Raises:
        RuntimeError: The device is the CPU and Megatron has been imported already.
    """
    global _device
    if _device is None:
        import torch  # here, so that a tool can refuse its flags before torch is imported

        device = "cuda" if use_cuda and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _install()
        patches.apply("megatron")  # imports Megatron, hence after the device is installed
        _device = device
    return _device


def is_cpu_device() -> bool:
    """Return whether `activate` has installed the CPU device in this process."""
    return _device == "cpu"


def device_default_args() -> list[str]:
    """Return Megatron's flags for the device, to be put before the flags of the user.

    On the CPU device they choose gloo and the layers written in plain torch, and turn off kernels
    that exist for CUDA only. On CUDA they turn off the kernels whose packages are not installed,
    without which Megatron would not start: the rotary embedding of Transformer Engine, and the
    gradient accumulation of NVIDIA's apex. (Megatron's `args_defaults` cannot carry the flags: it
    fills only flags without a value.)
    """
    if is_cpu_device():
        return [
            "--distributed-backend", "gloo",
            "--transformer-impl", "local",
            "--no-rope-fusion",
            "--no-gradient-accumulation-fusion",
            "--no-masked-softmax-fusion",
            "--no-persist-layer-norm",
        ]  # fmt: skip
    kernels = {
        "transformer_engine": "--no-rope-fusion",
        "fused_weight_gradient_mlp_cuda": "--no-gradient-accumulation-fusion",
    }
    return [flag for module, flag in kernels.items() if importlib.util.find_spec(module) is None]


def _install() -> None:
    """Install the CPU device behind `torch.cuda`."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("activate() must be called before anything of megatron is imported")
    _hide_gpu_packages()
    _keep_freed_memory()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron refuses tensor parallelism unless CUDA would run its kernels in launch order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # transformers imports DeepSpeed where it is installed, which would use `torch.cuda`.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    patches.apply("cpu device")


def _hide_gpu_packages() -> None:
    """Hide installed packages that need a GPU, so that Megatron falls back to torch.

    Megatron uses their optimizer and gradient norm wherever they can be imported, for example on
    the login node of a cluster, and fails when they launch their first kernel.
    """
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def compiler_settings() -> dict[str, Any]:
    """Return the setting by which `torch.compile`d functions run eagerly.

    It is the first patch of the CPU device: applying it imports Dynamo, which registers torch's
    functions by identity and must therefore be imported before they are replaced.
    """
    return {"torch._dynamo.config.disable": True}


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory of tensors, as torch does with CUDA's memory.

    By default glibc returns blocks of megabytes to the system, which clears every page of them
    before the next tensor uses them: 10,000 page faults and some percent of the time of an MoE
    layer's step. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # constants of malloc.h
        mallopt(mmap_max, 0)  # large blocks come from the heap, too
        mallopt(trim_threshold, (1 << 31) - 1)


def dataset_helpers() -> dict[str, Callable[[], None]]:
    """Return a replacement for Megatron's compilation of its dataset helpers.

    There is none if the helpers have to be compiled because the wheel does not contain them.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return {}
    return {"megatron.core.datasets.utils.compile_helpers": lambda: None}
