"""Where a command may write."""

from pathlib import Path

from megatron_ext.errors import UserError


def check_folder(output: str | Path) -> None:
    """Raise a UserError where a folder of --output, or one above it, is a file; make nothing."""
    for path in (Path(output), *Path(output).absolute().parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder: give another --output")
