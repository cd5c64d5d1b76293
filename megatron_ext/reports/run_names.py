"""Short names of compared runs, from their folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest names that distinguish folders: the last parts of their paths.

    Raises:
        UserError: Two paths are the same folder.
    """
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders):
        if folders.count(folder) > 1:
            raise UserError(f"{path} occurs twice. Name each run once.")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        above = os.path.commonpath(folders)
        names = [os.path.relpath(folder, above) for folder in folders]
    return names


def seeds_name(names: Sequence[str]) -> str:
    """Return the name of runs that differ in their seed only: the common prefix of their names.

    >>> seeds_name(["et-seed1", "et-seed2"])
    'et'
    """
    common = os.path.commonprefix(list(names))  # noqa: RUF071
    return re.sub(r"[-_. /]*(seed|s)?[-_. /=]*\d*$", "", common) or names[0]
