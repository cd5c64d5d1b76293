"""Folders that a command writes: checks before the work, and creation in one step."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError


def check_new(save: Path, flag: str = "--save") -> None:
    """Check that a flag names a new or an empty folder.

    Args:
        save: The folder.
        flag: The flag, for messages.

    Raises:
        UserError: It is a file, or a folder that is not empty.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"{flag} {save} already exists. Choose a new folder.")


def check_output_folder(output: str | Path) -> None:
    """Check that a folder of --output can be made, without making it.

    Args:
        output: The folder.

    Raises:
        UserError: If the folder, or one above it, is a file.
    """
    for path in (Path(output), *Path(output).absolute().parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder. Choose another --output.")


@contextmanager
def new_folder(save: Path, overwrite: bool = False) -> Iterator[Path]:
    """Create a folder that appears under its name only when it is complete.

    The context is a temporary folder to write into. At the end it is renamed to `save`; after an
    error it is deleted.

    Args:
        save: Folder to create.
        overwrite: Whether to replace an existing folder.

    Raises:
        UserError: `save` exists and is not an empty folder.
    """
    if not overwrite:
        check_new(save)
    save.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{save.name}-", dir=save.absolute().parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if overwrite:
            shutil.rmtree(save, ignore_errors=True)
        elif save.exists():
            save.rmdir()  # empty
        temporary.rename(save)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
