"""Where a run's checkpoints are; without Megatron, so that a wrong path is told at once."""

import os
from pathlib import Path

from megatron_ext.errors import UserError


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
    trackers = [f / "latest_checkpointed_iteration.txt" for f in (root / "checkpoints", root)]
    tracker = next((file for file in trackers if file.is_file()), None)
    if tracker is None:
        if root.name.startswith("iter_"):
            raise UserError(f"{root} is an incomplete checkpoint: it has no metadata")
        raise UserError(f"{root} holds no checkpoint: train with --run-dir or --save first")
    newest = tracker.read_text().strip()
    folder = tracker.parent / (f"iter_{int(newest):07d}" if newest.isdigit() else newest)
    if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"{tracker} names {newest or 'nothing'}, but {folder} is missing or incomplete: "
            "give the folder of an earlier iteration"
        )
    return folder
