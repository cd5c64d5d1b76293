"""Discovery, verification and reading of checkpoints, for resumed training and for inference.

A checkpoint is valid if all its files match the digests in Megatron's `integrity.json`, which is
written last. Megatron is imported only where it is needed, so that a wrong path is reported at
once.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file next to the folders of the iterations; it names the newest one."""

INTEGRITY_FILE = "integrity.json"
"""Megatron's list of a checkpoint's files with their SHA-256 digests, written last."""


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the folder of the newest iteration.

    Args:
        path: Run directory, folder of checkpoints, or folder of one iteration.

    Raises:
        UserError: There is no checkpoint, or it is incomplete.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder. Choose a run directory or a checkpoint.")
    if (root / "metadata.json").is_file() and (root / ".metadata").is_file():
        return root
    trackers = [f / TRACKER for f in (root / "checkpoints", root)]
    tracker = next((file for file in trackers if file.is_file()), None)
    if tracker is None:
        if root.name.startswith("iter_"):
            raise UserError(
                f"{root} is an incomplete checkpoint without metadata. Choose another iteration."
            )
        if (root / "run.json").is_file() and (root / "checkpoints").is_dir():
            raise UserError(
                f"{root} has no model yet. An alignment run writes one to final/ or best/."
            )
        raise UserError(f"{root} has no checkpoint. Train with --run-dir or --save first.")
    newest = tracker.read_text().strip()
    folder = tracker.parent / (f"iter_{int(newest):07d}" if newest.isdigit() else newest)
    if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"{tracker} names {newest or 'nothing'}, but {folder} is missing or incomplete. "
            "Choose the folder of an earlier iteration."
        )
    return folder


def iterations(folder: Path) -> list[str]:
    """Return the names of all iterations in a folder of checkpoints, newest first.

    Incomplete ones are included.
    """
    return sorted((f.name for f in folder.glob("iter_*") if f.name[5:].isdigit()), reverse=True)


def file_digest(file: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_and_digest(write: Callable[..., None], folder: str, rank: int, *args: Any) -> None:
    """Write the files of a rank and their digests, in the writing process.

    The rank reads the digests from `digests_file`, so that training does not read the files of an
    asynchronous save again.

    Args:
        write: Megatron's function that writes the files.
        folder: Checkpoint to write.
        rank: Rank of the files, whose names begin with `__RANK_`.
        *args: Arguments of `write`.
    """
    write(*args)  # reports its errors to the rank
    try:
        digests = {file.name: file_digest(file) for file in Path(folder).glob(f"__{rank}_*")}
        digests_file(folder, rank).write_text(json.dumps(digests))
    except OSError:  # the rank hashes files without a digest and reports unreadable ones
        pass


def digests_file(folder: str | os.PathLike[str], rank: int) -> Path:
    """Return the file in which `write_and_digest` stores the digests of a rank's files."""
    return Path(folder, f"digests_{rank}.tmp")


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return a description of the damage to the files of a checkpoint, or None.

    Several ranks can divide the reading of a large checkpoint. Each of them checks that all files
    exist.

    Args:
        checkpoint: Folder of one iteration.
        share: Index of the share of the files to read.
        shares: Number of shares.
    """
    manifest = checkpoint / INTEGRITY_FILE
    try:
        digests: dict[str, str] = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return f"it has no {INTEGRITY_FILE}: it was not saved completely"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {INTEGRITY_FILE} cannot be read"
    for number, (name, digest) in enumerate(sorted(digests.items())):
        file = checkpoint / name
        if not file.is_file():
            return f"its file {name} is missing"
        try:
            if number % shares == share and file_digest(file) != digest:
                return f"its file {name} differs from what was saved"
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror}"
    return None


def read_common_state(checkpoint: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that all ranks share, such as the arguments of the run.

    Raises:
        UserError: The checkpoint is damaged, or was saved by another program.
    """
    from megatron.core import dist_checkpointing

    state = readable(checkpoint, lambda: dist_checkpointing.load_common_state_dict(checkpoint))
    if not hasattr(state.get("args"), "router_type"):
        raise UserError(f"{checkpoint} was not saved by pretrain_et.py: it lacks --router-type.")
    return state


def readable(checkpoint: Path, read: Callable[[], Any]) -> Any:
    """Return the result of `read`, and report any error as a damaged checkpoint.

    Torch and Megatron may raise any exception for a damaged file.

    Args:
        checkpoint: Folder of the iteration, for the message.
        read: Function that reads from it.

    Raises:
        UserError: `read` raised an exception.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # no subclass of Exception

    try:
        return read()
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # contains the errors of all ranks
            cause = next(iter(error.failures.values()))[0]
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{checkpoint} is incomplete or damaged: {reason}") from error
