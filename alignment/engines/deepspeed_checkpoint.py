"""Check of DeepSpeed's checkpoints before they are loaded."""

from pathlib import Path
from zipfile import ZipFile

from megatron_ext.errors import UserError


def verify_checkpoint(folder: Path, rank: int, size: int) -> None:
    """Check a checkpoint before DeepSpeed loads it, because a failing rank would block the others.

    Args:
        folder: Folder of the checkpoints.
        rank: This rank, which reads a share of the files.
        size: Number of ranks.

    Raises:
        UserError: There is no checkpoint, it has another number of ranks, or it is damaged.
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise UserError(f"{folder} has no checkpoint of DeepSpeed. Save one first.")
    files = sorted((folder / latest.read_text().strip()).glob("*.pt"))
    saved = sum(file.name.endswith("_optim_states.pt") for file in files)
    if saved != size:
        raise UserError(
            f"The checkpoint in {folder} cannot be loaded: DeepSpeed resumes with as many ranks as "
            f"saved it. Start {saved} ranks, not {size}."
        )
    for file in files[rank::size]:
        if not _is_whole(file):
            raise UserError(f"The checkpoint in {folder} is incomplete or damaged: {file.name}.")


def _is_whole(file: Path) -> bool:
    """Return whether a file of torch.save, which is a zip archive, is complete and intact."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive may raise any exception
        return False
