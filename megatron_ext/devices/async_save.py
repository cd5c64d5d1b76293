"""Asynchronous saving by Megatron with tensors in host memory and without orphaned processes.

A separate process writes the checkpoint. It receives the tensors through shared memory and copies
them off the GPU, while training continues. On the CPU there is nothing to copy, so the process
would write tensors that the next steps have changed. It would also wait for work indefinitely if
its rank were killed, and so would the process through which it reports.

Megatron is imported inside functions, because the writing process imports this module first, and
the device must be active before Megatron is imported.
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
    """Run the writing process: activate the device, then Megatron's loop."""
    global _writing
    end_with_parent()
    from megatron_ext.devices import activate

    activate()
    _writing = True
    _async_loop(*args)


def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Copy tensors off the device as Megatron does, into memory that training cannot change."""
    loaded = _preload_tensors(write_buckets, non_blocking)
    if not _writing:  # the rank itself writes and waits
        return loaded
    return [
        (file, key, (other, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (other, tensors) in loaded
    ]


def get_write_results_queue(mp_mode: str = "spawn") -> Any:
    """Return the queue of the results of writing, whose process ends with its rank.

    Only a writing process needs a queue that processes share. A rank that writes synchronously,
    which passes "spawn", uses a queue in this process; Megatron's queue would start a process that
    imports the whole program again.
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
