"""Pool of processes that write the parts."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.data.preprocessing.document_counts import DocumentCounts
from megatron_ext.data.preprocessing.parts import (
    Encoder,
    PartCounts,
    PartSpec,
    read_part,
    write_part,
)
from megatron_ext.data.preprocessing.source_tokenizer import SourceTokenizer
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

# State of a worker process, set by start_worker.
_encoder: Encoder
_consumed: Any


def start_worker(tokenizer: SourceTokenizer, dtype: str, threads: int, consumed: Any) -> None:
    """Initialize a worker process, which exits when the main process is killed.

    Args:
        tokenizer: The tokenizer.
        dtype: Data type of the tokens.
        threads: Number of threads of a Rust tokenizer.
        consumed: Shared counter of the bytes that all workers have read.
    """
    global _encoder, _consumed
    _encoder, _consumed = tokenizer.encoder(dtype, threads), consumed
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_part_in_worker(spec: PartSpec, folder: Path) -> PartCounts:
    """Write a part with the encoder of this worker process."""
    return write_part(spec, folder, _encoder, _consumed)


def write_parts(
    specs: list[PartSpec],
    tokenizer: SourceTokenizer,
    folder: Path,
    workers: int,
    max_malformed: int,
) -> tuple[list[PartCounts], DocumentCounts]:
    """Write the parts that do not exist yet.

    Args:
        specs: All parts, in order.
        tokenizer: The tokenizer.
        folder: Folder of the parts.
        workers: Number of processes. With fewer parts, a Rust tokenizer gets the rest as threads.
        max_malformed: Maximum number of malformed lines.

    Returns:
        The counts of each part, in order, and their sum.

    Raises:
        UserError: A file is broken or has no document, or there are too many malformed lines.
    """
    finished = [read_part(spec, folder) for spec in specs]
    todo = [spec for spec, part in zip(specs, finished) if part is None]
    if len(todo) < len(specs):
        print(f"reusing {len(specs) - len(todo):,} of {len(specs):,} finished parts in {folder}")
    context = multiprocessing.get_context("spawn")
    consumed = context.Value("q", 0)
    parts: list[PartCounts] = []
    with Progress("tokenizing", sum(spec.size for spec in todo)) as progress:
        counts = DocumentCounts(specs, max_malformed, progress)
        processes = max(1, min(workers, len(todo)))
        with concurrent.futures.ProcessPoolExecutor(
            processes, context, start_worker,
            (tokenizer, specs[0].dtype, workers // processes, consumed),
        ) as pool:  # fmt: skip
            try:
                # Workers start here and inherit the ignored Ctrl-C, which the main process handles.
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
                futures = [pool.submit(write_part_in_worker, spec, folder) for spec in todo]
                signal.signal(signal.SIGINT, handler)
                pending = iter(futures)
                for part in finished:
                    if part is None:
                        future = next(pending)
                        while not concurrent.futures.wait([future], timeout=0.5).done:
                            progress.update(consumed.value, counts.summary)
                        part = future.result()
                    counts.add(part)
                    parts.append(part)
                    progress.update(consumed.value, counts.summary)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    "A worker process was killed, possibly because memory ran out. Run the same "
                    "command with fewer --workers to resume with the finished parts."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return parts, counts
