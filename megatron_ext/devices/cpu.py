"""The CPU device: Megatron's real trainer over gloo on a machine without CUDA.

Megatron asks `torch.cuda` for its device, streams, memory and random state, and places tensors on
"cuda". The CPU device answers those questions for the CPU and places those tensors in host memory;
Megatron's own code runs as it is. Each concern has a file: `runtime` (what `torch.cuda` says),
`placement` (where tensors go), `randomness` (two random states on one generator) and `gloo`
(collectives that gloo lacks).
"""

import ctypes
import importlib.util
import os
import sys

import torch

_device: str | None = None


def activate(use_cuda: bool = True) -> str:
    """Decide once which device Megatron runs on and return it: "cuda" or "cpu".

    With CUDA available, and unless `use_cuda` is False, torch stays untouched. Otherwise the CPU
    device is installed, which must happen before Megatron is imported, because its modules keep
    references to torch functions.
    On either device Megatron is kept from two failures of its own: compiling dataset helpers it
    has, and resuming with torch's Adam. Calling again returns the first decision.

    Raises:
        RuntimeError: the device is the CPU and Megatron has been imported already.
    """
    global _device
    if _device is None:
        device = "cuda" if use_cuda and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _install()
        _use_prebuilt_dataset_helpers()
        _mend_megatron()
        _device = device
    return _device


def is_cpu_device() -> bool:
    """Whether `activate` has installed the CPU device in this process."""
    return _device == "cpu"


def cpu_default_args() -> list[str]:
    """Megatron's flags that the CPU device needs, to go before the user's on the command line.

    They choose gloo and the layers written in plain torch, and turn off kernels that exist for
    CUDA only. (Megatron's `args_defaults` cannot carry them: it fills only flags without a value.)
    """
    return [
        "--distributed-backend", "gloo",
        "--transformer-impl", "local",
        "--no-rope-fusion",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-persist-layer-norm",
    ]  # fmt: skip


def _install() -> None:
    if "megatron.core" in sys.modules:
        raise RuntimeError("activate() must be called before anything of megatron is imported")
    _hide_gpu_packages()
    _disable_compiler()
    _keep_freed_memory()
    # Megatron refuses tensor parallelism unless CUDA would run its kernels in launch order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # transformers imports DeepSpeed where it is installed, which would ask `torch.cuda`.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from megatron_ext.devices import gloo, placement, randomness, runtime

    runtime.install()
    randomness.install()
    placement.install()
    gloo.install()


def _hide_gpu_packages() -> None:
    """Let Megatron fall back to torch where packages are installed that need a GPU.

    It takes the optimizer and the norm of gradients from them wherever they can be imported, as on
    the login node of a cluster, and fails when they launch their first kernel.
    """
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def _disable_compiler() -> None:
    """Run `torch.compile`d functions eagerly: compiling them takes minutes and a C++ compiler.

    Dynamo is imported here and not later by Megatron, because it files torch's functions by
    identity and must see the originals.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, as torch does with CUDA's memory.

    It would give blocks of megabytes back to the system, which clears every page of them before
    the next tensor gets them: 10,000 page faults and some percent of the time of an MoE layer's
    step. Blocks of 32 MiB and more are always given back. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, (1 << 31) - 1)


def _use_prebuilt_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers where the wheel brought them compiled.

    Its trainer runs `make` in the package, but the wheel leaves the Makefile out, and a failing
    `make` ends the process, whatever the device.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        from megatron.core.datasets import utils

        utils.compile_helpers = lambda: None


def _mend_megatron() -> None:
    # Imports Megatron, hence not before the device is installed.
    from megatron_ext.devices import async_save, torch_optimizer

    torch_optimizer.install()
    async_save.install()
