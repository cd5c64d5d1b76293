"""Functions that a configuration names by their path, so that users need not fork the project."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """Return the function at a path.

    Args:
        path: `FILE.py:NAME` or `package.module:NAME`.
        flag: Flag or key that names the path, for the error message.

    Raises:
        UserError: There is no such file, module or function, or it fails while it is loaded.
    """
    place, separator, name = path.rpartition(":")
    if not separator or not place or not name:
        raise UserError(f"{flag} {path} is not a function path. Write FILE.py:NAME or MODULE:NAME.")
    try:
        module = (
            _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
        function = getattr(module, name)
    except Exception as error:  # a user's file may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{flag} {path} cannot be loaded ({problem}). Check the path and the file."
        ) from error
    if not callable(function):
        raise UserError(f"{flag} {path} is not a function. Name a function of that module.")
    return function  # type: ignore[no-any-return]


def _load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
