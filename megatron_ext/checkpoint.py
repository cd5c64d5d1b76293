"""Finding, checking and reading checkpoints, for training that resumes and for inference.

A checkpoint is valid whole or not at all: what Megatron's `integrity.json`, written last, says of
its files must be so. Megatron is imported where it is needed, so that a wrong path is told at once.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file beside the iterations; names the newest."""

INTEGRITY_FILE = "integrity.json"
"""Megatron's list of a checkpoint's files with their SHA-256, the last file to be written."""


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder of the newest iteration under a run directory or a folder of checkpoints.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give a run directory or one of its checkpoints")
    if (root / "metadata.json").is_file() and (root / ".metadata").is_file():
        return root
    trackers = [f / TRACKER for f in (root / "checkpoints", root)]
    tracker = next((file for file in trackers if file.is_file()), None)
    if tracker is None:
        if root.name.startswith("iter_"):
            raise UserError(f"{root} is an incomplete checkpoint: it has no metadata")
        if (root / "run.json").is_file() and (root / "checkpoints").is_dir():
            raise UserError(
                f"{root} holds no model yet: an alignment run writes one into final/ or best/"
            )
        raise UserError(f"{root} holds no checkpoint: train with --run-dir or --save first")
    newest = tracker.read_text().strip()
    folder = tracker.parent / (f"iter_{int(newest):07d}" if newest.isdigit() else newest)
    if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"{tracker} names {newest or 'nothing'}, but {folder} is missing or incomplete: "
            "give the folder of an earlier iteration"
        )
    return folder


def find_model(path: str | os.PathLike[str]) -> Path:
    """Return a model to run: a Hugging Face folder, or the folder of a checkpoint's iteration.

    Args:
        path: a run directory, a folder of checkpoints, the folder of one iteration, a Hugging Face
            folder, or the run directory of an alignment run, whose model is in `final` (policies)
            or `best` (judges and supervised fine-tuning).

    Raises:
        UserError: there is no model, or an incomplete one.
    """
    root = Path(path)
    for folder in (root, root / "final", root / "best"):
        if is_hf_folder(folder):
            return folder
    return find_checkpoint(root)


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder is one of Hugging Face's."""
    return (folder / "config.json").is_file()


def iterations(folder: Path) -> list[str]:
    """Names of the iterations saved in a folder of checkpoints, whole or not, newest first."""
    return sorted((f.name for f in folder.glob("iter_*") if f.name[5:].isdigit()), reverse=True)


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_and_digest(write: Callable[..., None], folder: str, rank: int, *args: Any) -> None:
    """Write a rank's files of a checkpoint, then hash them, in the process that writes.

    The digests are left for the rank in `digests_file`, so that training does not read back what
    was saved asynchronously.

    Args:
        write: Megatron's function that writes the files, called with `args`.
        folder: Checkpoint being written.
        rank: Rank whose files these are; their names begin with `__RANK_`.
    """
    write(*args)  # reports its errors to the rank
    try:
        digests = {file.name: file_digest(file) for file in Path(folder).glob(f"__{rank}_*")}
        digests_file(folder, rank).write_text(json.dumps(digests))
    except OSError:  # the rank hashes what is missing here, and reports what cannot be read
        pass


def digests_file(folder: str | os.PathLike[str], rank: int) -> Path:
    """Return where `write_and_digest` leaves the digests of a rank's files."""
    return Path(folder, f"digests_{rank}.tmp")


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Args:
        checkpoint: the folder of one iteration.
        share: only every `shares`-th file is read, from this one on, so that many ranks can read a
            large checkpoint together. Whether all files are there is always checked.
        shares: see `share`.
    """
    manifest = checkpoint / INTEGRITY_FILE
    try:
        digests: dict[str, str] = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return f"it has no {INTEGRITY_FILE}: its saving did not come to an end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {INTEGRITY_FILE} cannot be read"
    for number, (name, digest) in enumerate(sorted(digests.items())):
        file = checkpoint / name
        if not file.is_file():
            return f"its file {name} is missing"
        try:
            if number % shares == share and file_digest(file) != digest:
                return f"its file {name} is not as it was saved"
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror}"
    return None


def read_common_state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that is not spread over ranks, the run's arguments above all.

    Raises:
        UserError: it is damaged, or another program saved it.
    """
    from megatron.core import dist_checkpointing

    state = readable(checkpoint, lambda: dist_checkpointing.load_common_state_dict(checkpoint))
    if not hasattr(state.get("args"), "router_type"):
        raise UserError(f"{checkpoint} was not saved by pretrain_et.py: it lacks --router-type")
    return state


def readable(checkpoint: Path, read: Callable[[], Any]) -> Any:
    """The result of `read`; torch and Megatron raise anything at all over a damaged file.

    Raises:
        UserError: in place of what `read` raised.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # no subclass of Exception

    try:
        return read()
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # holds the errors of all ranks
            cause = next(iter(error.failures.values()))[0]
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{checkpoint} is incomplete or damaged: {reason}") from error
