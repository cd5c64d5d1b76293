"""Megatron's asynchronous saving with tensors in host memory, and without processes left behind.

A process of its own writes the checkpoint. It gets the tensors through shared memory, copies them
off the GPU, and training goes on. On the CPU there is nothing to copy, so it would write what the
next steps make of them. And it would wait for work for ever if its rank were killed, as would the
process through which it reports.

Megatron is imported where it is needed: the process that writes comes here first, and the device
must be active before.
"""

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_ext.processes import end_with_parent

_writing = False  # whether this is the process that writes
_async_loop: Callable[..., None]
_preload_tensors: Callable[..., list[Any]]


def write_for_a_rank(*args: Any) -> None:
    """The main function of the process that writes."""
    global _writing
    end_with_parent()
    from megatron_ext.devices import activate

    activate()
    _writing = True
    _async_loop(*args)


def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Megatron's function of that name, with tensors that training cannot change."""
    loaded = _preload_tensors(write_buckets, non_blocking)
    if not _writing:  # the rank itself writes and waits
        return loaded
    return [
        (file, key, (other, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (other, tensors) in loaded
    ]


def get_write_results_queue(mp_mode: str = "spawn") -> Any:
    """Megatron's function of that name; the process that holds the queue ends with its rank.

    Only a process that writes needs one. A rank that writes by itself, which asks for "spawn", gets
    a queue of its own; Megatron's would import this whole program again to hold it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None and mp_mode == "spawn":
        filesystem_async._results_queue = queue.Queue()
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue


def replacements() -> dict[str, Any]:
    """Return the replacements of Megatron's functions."""
    global _async_loop, _preload_tensors
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    writer = filesystem_async.FileSystemWriterAsync
    _async_loop, _preload_tensors = PersistentAsyncCaller.async_loop, writer.preload_tensors
    module = "megatron.core.dist_checkpointing.strategies"
    return {
        f"{module}.async_utils.PersistentAsyncCaller.async_loop": staticmethod(write_for_a_rank),
        f"{module}.filesystem_async.FileSystemWriterAsync.preload_tensors": staticmethod(
            preload_tensors
        ),
        f"{module}.filesystem_async.get_write_results_queue": get_write_results_queue,
    }
