"""Replacements of the functions of `torch.cuda` on the CPU device.

Everything runs in program order, so streams and events are always completed. Memory is the
resident set of the process.
"""

import contextlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch

DEVICE_INDEX = 0
# The capability of Ampere, which has bf16 and none of Megatron's kernels for newer architectures.
CAPABILITY = (8, 0)
TENSOR_TYPES = (
    "BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short",
)  # fmt: skip


class Stream:
    """Stream of the CPU device; all instances are equal, because there is only one stream."""

    device = torch.device("cuda", DEVICE_INDEX)
    device_index = DEVICE_INDEX
    priority = 0
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest priority, which are the same."""
        return 0, 0

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing: the work of the stream is completed."""

    def wait_event(self, event: "Event") -> None:
        """Do nothing: the event is completed."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record an event, a new one by default, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Do nothing: the work of the stream is completed."""

    def query(self) -> bool:
        """Return that the work of the stream is completed."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)


class Event:
    """Point in program order; two events measure wall-clock time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Record the current time."""
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to `end`."""
        if self._recorded_at is None or end._recorded_at is None:
            raise RuntimeError("elapsed_time needs two events that have been recorded")
        return (end._recorded_at - self._recorded_at) * 1e3

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing: the event is completed."""

    def synchronize(self) -> None:
        """Do nothing: the event is completed."""

    def query(self) -> bool:
        """Return that the event is completed."""
        return True


class DeviceGuard:
    """Replacement for the context manager `torch.cuda.device`, without effect on one device."""

    def __init__(self, device: Any = None) -> None:
        self.idx = self.prev_idx = DEVICE_INDEX

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


@contextlib.contextmanager
def stream_guard(stream: Stream | None) -> Iterator[None]:
    """Run a block unchanged, as there is only one stream."""
    yield


class ProcessMemory:
    """Meter of the resident bytes of the process, whose peak is the largest reading."""

    def __init__(self) -> None:
        self._peak = 0

    def current(self, device: Any = None) -> int:
        """Return the resident bytes of the process."""
        resident = psutil.Process().memory_info().rss
        self._peak = max(self._peak, resident)
        return resident

    def peak(self, device: Any = None) -> int:
        """Return the largest reading since the start or the last reset, in bytes."""
        self.current()
        return self._peak

    def reset_peak(self, device: Any = None) -> None:
        """Set the peak to 0."""
        self._peak = 0

    def stats(self, device: Any = None) -> dict[str, int]:
        """Return the dictionary of `torch.cuda.memory_stats`, 0 for keys without a meaning here."""
        stats: dict[str, int] = defaultdict(int)
        for kind in ("active", "allocated", "requested", "reserved"):
            stats[f"{kind}_bytes.all.current"] = self.current()
            stats[f"{kind}_bytes.all.peak"] = self.peak()
        return stats

    def info(self, device: Any = None) -> tuple[int, int]:
        """Return the available and the total bytes of the machine."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total


def device_name(device: Any = None) -> str:
    """Return the name of the processor."""
    return platform.processor() or platform.machine()


def device_properties(device: Any = None) -> SimpleNamespace:
    """Return the attributes of `torch.cuda.get_device_properties` that Megatron reads."""
    major, minor = CAPABILITY
    return SimpleNamespace(
        name=device_name(),
        major=major,
        minor=minor,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )


def _always(value: Any) -> Callable[..., Any]:
    """Return a function that ignores its arguments and returns a value."""
    return lambda *args, **kwargs: value


def replacements() -> dict[str, Any]:
    """Return the replacements of the functions and classes of `torch.cuda`."""
    memory = ProcessMemory()
    nothing = _always(None)
    stream = _always(Stream())
    functions = {
        "is_available": _always(True),
        "device_count": _always(1),
        "current_device": _always(DEVICE_INDEX),
        "set_device": nothing,
        "device": DeviceGuard,
        "device_of": DeviceGuard,
        "get_device_name": device_name,
        "get_device_capability": _always(CAPABILITY),
        "get_device_properties": device_properties,
        "is_bf16_supported": _always(True),
        "synchronize": nothing,
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "stream": stream_guard,
        "current_stream": stream,
        "default_stream": stream,
        "set_stream": nothing,
        "is_current_stream_capturing": _always(False),
        "memory_allocated": memory.current,
        "memory_reserved": memory.current,
        "max_memory_allocated": memory.peak,
        "max_memory_reserved": memory.peak,
        "reset_peak_memory_stats": memory.reset_peak,
        "reset_max_memory_allocated": memory.reset_peak,
        "memory_stats": memory.stats,
        "mem_get_info": memory.info,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        **{f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in TENSOR_TYPES},
    }
    return {f"torch.cuda.{name}": function for name, function in functions.items()}


def states() -> dict[str, Any]:
    """Return the replacements of the states of `torch.cuda`, of nvtx and of accelerators."""
    ranges = ("mark", "range_end", "range_pop", "range_push", "range_start")
    return {
        # Work that waits for the initialization, such as seeding, runs at once.
        "torch.cuda._initialized": True,
        # Checking for CUDA marks forked processes as unable to use it, which does not matter here.
        "torch.cuda._is_in_bad_fork": _always(False),
        # torch uses `torch.accelerator` for real hardware, to pin memory for example.
        "torch.accelerator.is_available": _always(False),
        **{f"torch.cuda.nvtx.{name}": _always(None) for name in ranges},
        "torch.cuda.nvtx.range": _always(contextlib.nullcontext()),
    }
