"""Choice of the checkpoint to resume from, and saving without incomplete checkpoints.

Megatron's `--verify-integrity` hashes and checks every file on rank 0. Here the ranks share that
work, the check precedes all other work, and an older checkpoint can replace a damaged one.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext import patches
from megatron_ext.checkpoint import (
    INTEGRITY_FILE,
    TRACKER,
    damage,
    digests_file,
    file_digest,
    iterations,
    write_and_digest,
)
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.training.launch import Launch


def choose_checkpoint(args: Namespace, launch: Launch) -> Path | None:
    """Return the checkpoint under `--load` from which training resumes, or None to start anew.

    It is the newest one, or that of `--ckpt-step`, and must be intact. With
    `--allow-older-checkpoint` it is the newest intact one, whose step becomes `args.ckpt_step` if
    it is not the newest of all.

    Raises:
        UserError: A file is damaged; the message names it, on every rank.
    """
    folder = Path(args.load)
    launch.agree("tracker", lambda: repair_tracker(folder) if launch.rank == 0 else None)
    candidates = launch.share("checkpoints", _candidates(folder, args.ckpt_step))
    if not candidates:
        return None
    newest, *older = candidates
    problem = launch.first_problem(newest, damage(folder / newest, launch.rank, launch.size))
    if problem is None:
        return folder / newest
    message = f"{folder / newest} is damaged: {problem}"
    if not args.allow_older_checkpoint:
        raise UserError(
            f"{message}. Use --allow-older-checkpoint to resume from the newest intact one."
        )
    for name in older:
        if not launch.first_problem(name, damage(folder / name, launch.rank, launch.size)):
            if launch.rank == 0:
                console.warn(f"{message}; resuming from {folder / name}")
            args.ckpt_step = int(name.removeprefix("iter_"))
            return folder / name
    raise UserError(
        f"{message}, and no older checkpoint in that folder is intact. Use another folder."
    )


def _candidates(folder: Path, step: int | None) -> list[str]:
    """Return the names of checkpoints from which training can resume, the newest first."""
    tracker = folder / TRACKER
    if step is not None:
        newest = f"iter_{step:07d}"
    elif not tracker.is_file():
        return []
    else:
        newest = _tracked(tracker) or ""
    return [newest, *(name for name in iterations(folder) if name < newest)]


def _tracked(tracker: Path) -> str | None:
    """Return the name of the checkpoint in a tracker file, or None if the file is damaged."""
    text = tracker.read_text().strip()
    return f"iter_{int(text):07d}" if text.isdigit() else "release" if text == "release" else None


def repair_tracker(folder: Path) -> None:
    """Write the tracker for the newest complete checkpoint if a killed run did not write it.

    Raises:
        UserError: The tracker is damaged and there is no complete checkpoint.
    """
    tracker = folder / TRACKER
    if tracker.is_file() and _tracked(tracker):
        return
    complete = [name for name in iterations(folder) if (folder / name / INTEGRITY_FILE).is_file()]
    if complete:
        write_atomically(tracker, str(int(complete[0].removeprefix("iter_"))))
    elif tracker.is_file():
        raise UserError(
            f"{tracker} is damaged and no checkpoint in that folder is intact. Remove it."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it never exists with only a part of `text`.

    Raises:
        UserError: The file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def replacements() -> dict[str, Callable[..., Any]]:
    """Return Megatron's function that saves, completed by a list of digests from all ranks."""
    save = patches.original("megatron.core.dist_checkpointing.save")

    @wraps(save)
    def save_whole(state: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(checkpoint_dir)
        if dist.get_rank() == 0:  # remains of an interrupted save
            for file in folder.iterdir():
                file.unlink()
        dist.barrier()
        request = save(state, checkpoint_dir, *args, **kwargs)
        if request is None:
            _write_digests(folder)
            return None
        # In an asynchronous save digests are written after the files and before the tracker.
        request.finalize_fns.append(lambda: _write_digests(folder))
        if request.async_fn is None:  # this rank has nothing to write
            return request
        write = partial(write_and_digest, request.async_fn, str(folder), dist.get_rank())
        return request._replace(async_fn=write)

    return {"megatron.core.dist_checkpointing.save": save_whole}


def _write_digests(folder: Path) -> None:
    """List the files of a checkpoint with their digests, in Megatron's format.

    The writing processes have hashed the files of an asynchronous save. Each rank hashes its share
    of all other files.

    Raises:
        UserError: A file cannot be read or the list cannot be written; raised on every rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    digest_of_file: dict[str, str] = {}
    for digests in _gather(_take_digests(folder, rank)):
        digest_of_file |= digests
    # Rank 0 lists the files, because a network file system may show other ranks a later list.
    names: list[list[str]] = [[]]
    if rank == 0:
        files = {file.name for file in folder.iterdir() if file.suffix != ".tmp"}
        names = [sorted(files - digest_of_file.keys())]
    dist.broadcast_object_list(names, src=0)
    try:
        share: Any = {name: file_digest(folder / name) for name in names[0][rank::size]}
    except OSError as error:
        share = f"{error.filename} cannot be read: {error.strerror}"
    shares = _gather(share)
    problem = [next((share for share in shares if isinstance(share, str)), None)]
    if rank == 0 and problem[0] is None:
        digests = {
            name: digest for share in (digest_of_file, *shares) for name, digest in share.items()
        }
        manifest = {"algorithm": "sha256", "files": dict(sorted(digests.items()))}
        try:
            write_atomically(folder / INTEGRITY_FILE, json.dumps(manifest, indent=1) + "\n")
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def _take_digests(folder: Path, rank: int) -> dict[str, str]:
    """Read and remove the digests that `write_and_digest` wrote for this rank, if any."""
    file = digests_file(folder, rank)
    try:
        digests: dict[str, str] = json.loads(file.read_text())
    except (OSError, ValueError):  # missing or damaged: the files are hashed again
        digests = {}
    file.unlink(missing_ok=True)
    return digests


def _gather(value: Any) -> list[Any]:
    """Return the values of all ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def explain_failure(save_checkpoint: Callable[..., None], args: Namespace) -> Callable[..., None]:
    """Wrap Megatron's `save_checkpoint` to remove an incomplete checkpoint and name the cause."""

    @wraps(save_checkpoint)
    def explained(iteration: int, *rest: Any, **kwargs: Any) -> None:
        try:
            save_checkpoint(iteration, *rest, **kwargs)
        except (Exception, CheckpointException) as error:
            folder = Path(args.save, f"iter_{iteration:07d}")
            existing = next(path for path in folder.absolute().parents if path.exists())
            free = shutil.disk_usage(existing).free / 1e6
            if not (folder / INTEGRITY_FILE).exists():  # otherwise it is complete
                shutil.rmtree(folder, ignore_errors=True)
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise UserError(
                f"Checkpoint {folder} could not be saved, with {free:,.1f} MB free in "
                f"{args.save}: {reason}; earlier ones are intact, and the same command resumes "
                "from the newest."
            ) from error

    return explained
