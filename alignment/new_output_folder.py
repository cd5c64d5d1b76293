"""Check of the folder that a command writes to."""

from pathlib import Path

from megatron_ext.errors import UserError


def check_folder(output: str | Path) -> None:
    """Check that a folder of --output can be made, without making it.

    Args:
        output: The folder.

    Raises:
        UserError: If the folder, or one above it, is a file.
    """
    for path in (Path(output), *Path(output).absolute().parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder. Choose another --output.")
