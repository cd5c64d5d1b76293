"""Parts written by many processes."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.data.preprocessing.encoding import DocumentEncoder
from megatron_ext.data.preprocessing.parts import PartCounts, PartSpec, read_part, write_part
from megatron_ext.data.preprocessing.tally import DocumentCounts
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

# A worker process's own, set once by start_worker.
_encoder: DocumentEncoder
_consumed: Any


def start_worker(model: str, dtype: str, consumed: Any) -> None:
    """Set a worker process up: one encoder, and an end when the main process is killed."""
    global _encoder, _consumed
    _encoder, _consumed = DocumentEncoder(model, dtype), consumed
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_part_in_worker(work: PartSpec, folder: Path) -> PartCounts:
    return write_part(work, folder, _encoder, _consumed)


def write_parts(
    works: list[PartSpec], folder: Path, workers: int, max_malformed: int
) -> tuple[list[PartCounts], DocumentCounts]:
    """Write the parts that are not there yet; the counts of all, in order, and their sum.

    Raises:
        UserError: a broken file, a file without a document, or more than `max_malformed` malformed
            lines.
    """
    known = [read_part(work, folder) for work in works]
    todo = [work for work, part in zip(works, known) if part is None]
    if len(todo) < len(works):
        print(f"reusing {len(works) - len(todo):,} of {len(works):,} finished parts in {folder}")
    context = multiprocessing.get_context("spawn")
    consumed = context.Value("q", 0)
    parts: list[PartCounts] = []
    with Progress("tokenizing", sum(work.size for work in todo)) as progress:
        tally = DocumentCounts(works, max_malformed, progress)
        with concurrent.futures.ProcessPoolExecutor(
            max(1, min(workers, len(todo))), context, start_worker,
            (works[0].tokenizer_model, works[0].dtype, consumed),
        ) as pool:  # fmt: skip
            try:
                # Workers start here and inherit a deaf ear to Ctrl-C; the main process decides.
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
                futures = [pool.submit(write_part_in_worker, work, folder) for work in todo]
                signal.signal(signal.SIGINT, handler)
                pending = iter(futures)
                for part in known:
                    if part is None:
                        future = next(pending)
                        while not concurrent.futures.wait([future], timeout=0.5).done:
                            progress.update(consumed.value, tally.summary)
                        part = future.result()
                    tally.add(part)
                    parts.append(part)
                    progress.update(consumed.value, tally.summary)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    "a worker was killed, maybe for want of memory: "
                    "run again, with fewer --workers, to go on with the finished parts"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return parts, tally
