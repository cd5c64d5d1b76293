"""A folder that is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError


def check_new(save: Path) -> None:
    """Raise a UserError where --save names something that is there already."""
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UserError(f"--save {save} is there already: give a new folder")


@contextmanager
def new_folder(save: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which gets the name `save` when all went well, and else is removed.

    Args:
        overwrite: replace a folder of that name.

    Raises:
        UserError: `save` is there already.
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
