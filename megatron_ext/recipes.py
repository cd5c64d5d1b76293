"""Recipes: YAML files that stand for flags of a command line."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError


def expand_recipes(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Replace each `--recipe FILE` by the flags it stands for.

    Raises:
        UserError: a file that cannot be read, or a key that is no flag.
    """
    expanded: list[str] = []
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if name != "--recipe":
            expanded.append(word)
            continue
        if not equals:
            if not remaining:
                raise UserError("--recipe needs the name of a YAML file")
            value = remaining.pop(0)
        expanded += _recipe_flags(Path(value), parser)
    return expanded


def _recipe_flags(path: Path, parser: ArgumentParser, seen: tuple[Path, ...] = ()) -> list[str]:
    if path in seen:
        raise UserError(f"{path}: recipes are each other's base")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--recipe {path} must be a mapping of flags to values")
    flags: list[str] = []
    if base := recipe.pop("base", None):
        flags = _recipe_flags(path.parent / str(base), parser, (*seen, path))
    for key, value in recipe.items():
        flags += _flag(str(key), value, parser, path)
    return flags


def _flag(key: str, value: Any, parser: ArgumentParser, path: Path) -> list[str]:
    """One entry of a recipe as words of the command line."""
    option = "--" + key.replace("_", "-")
    action = parser._option_string_actions.get(option)
    if action is None:
        # A key may name what a negative flag turns off: `bias_swiglu_fusion: false`.
        action = next((a for a in parser._actions if a.dest == key.replace("-", "_")), None)
    if action is None or key == "recipe":
        raise UserError(f"{path}: {key} is not a flag of {parser.prog} (see --help)")
    if option not in action.option_strings:
        option = action.option_strings[0]
        if action.nargs == 0:
            return [option] if value == action.const else []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} must be true or false, not {value!r}")
        return [option] if value else []
    values = value if isinstance(value, list) and action.nargs else [value]
    return [option, *("none" if v is None else str(v) for v in values)]
