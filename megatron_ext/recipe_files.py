"""Files of recipes: their search, their contents, and the error for an unknown key."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: Path of a file, or name of a recipe that is shipped with this project:
            `examples/recipes/d12.yaml`, `recipes/d12.yaml` or `d12`.

    Raises:
        UserError: There is neither such a file nor such a recipe.
    """
    if Path(name).exists() and not Path(name).is_dir():
        return Path(name)
    root = _examples()
    relative = Path(name.removeprefix("examples/"))
    for folder in ("", "recipes", "alignment"):
        for suffix in ("", ".yaml"):
            path = root / folder / f"{relative}{suffix}"
            if not relative.is_absolute() and path.is_file():
                return path
    if Path(name).is_dir():
        raise UserError(f"--recipe {name}: Is a directory. Use a YAML file in it.")
    shipped = [str(path.relative_to(root)) for path in sorted(root.rglob("*.yaml"))]
    by_word = {Path(path).stem: path for path in shipped} | {path: path for path in shipped}
    near = get_close_matches(relative.stem, by_word, n=3) or get_close_matches(name, by_word, n=3)
    advice = f"Did you mean {' or '.join(dict.fromkeys(by_word[word] for word in near))}?"
    if not near:
        advice = f"Use a path, or a recipe of {root}."
    raise UserError(f"--recipe {name}: No such file or directory. {advice}")


def _examples() -> Path:
    """Return the folder of examples in the checkout or in the installed package."""
    package = Path(__file__).resolve().parent
    return next(
        (folder for folder in (package.parent / "examples", package / "examples")
         if (folder / "recipes").is_dir()),
        package / "examples",
    )  # fmt: skip


def read_recipe(path: Path, including: tuple[Path, ...]) -> dict[Any, Any]:
    """Return the contents of a recipe.

    Args:
        path: File of the recipe.
        including: Recipes that have it as their base.

    Raises:
        UserError: The file cannot be read, is not a mapping, or has itself as a base.
    """
    if path.resolve() in including:
        raise UserError(
            f"{path} has itself as a base, directly or through other recipes. Remove one of their "
            "base keys."
        )
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--recipe {path} must be a mapping of flags to values.")
    return recipe


def unknown_key(path: Path, key: str, command: str, flags: Collection[str]) -> UserError:
    """Return the error for a key that is not a flag, with the most similar flag."""
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    names -= {"recipe", "_h", "help"}
    near = get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.75)
    advice = f"did you mean {near[0]}?" if near else "see --help"
    return UserError(f"{path}: {key} is not a flag of {command} ({advice}).")
