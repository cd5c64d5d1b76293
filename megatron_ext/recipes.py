"""Recipes: YAML files that stand for flags of a command line."""

from argparse import Action, ArgumentParser
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError

_COMMAND_LINE = "the command line"

# Arguments of which one side is given: what the command line or a later recipe gives of one side
# replaces what an earlier recipe gives of the others.
_ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("train_iters", "lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"),
        ("train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"),
    ),
    (("lr_warmup_fraction",), ("lr_warmup_iters",), ("lr_warmup_samples",)),
    (("global_batch_size",), ("step_batch_size_schedule",), ("rampup_batch_size",)),
    (
        ("data_path", "split"),
        ("data_args_path", "split"),
        ("train_data_path", "valid_data_path", "test_data_path"),
        ("per_split_data_args_path",),
        ("mock_data", "split"),
    ),
    (("bf16",), ("fp16",)),
    (("swiglu",), ("squared_relu",), ("quick_geglu",)),
    (
        ("num_layers_per_virtual_pipeline_stage",),
        ("num_virtual_stages_per_pipeline_rank",),
        ("pipeline_model_parallel_layout",),
    ),
    (("override_opt_param_scheduler",), ("use_checkpoint_opt_param_scheduler",)),
    (("use_rotary_position_embeddings",), ("position_embedding_type",)),
    (("recompute_activations",), ("recompute_granularity",)),
)
_LENGTHS = ("train_iters", "train_samples")


@dataclass(frozen=True)
class _Entry:
    """One flag of an expanded command line.

    Attributes:
        source: the recipe's file, or `_COMMAND_LINE`.
        action: of the parser; None for words that belong to no flag it knows.
        words: the flag and its values; none where a recipe removes the flag.
    """

    source: Path | str
    action: Action | None
    words: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """Name of the argument."""
        return None if self.action is None else self.action.dest

    @property
    def decides(self) -> bool:
        """Whether it can replace alternatives: a length of 0 only takes itself back."""
        value = self.words[1:] or tuple(self.words[0].split("=")[1:]) if self.words else ()
        return bool(self.words) and not (self.name in _LENGTHS and value == ("0",))


def expand_recipes(
    argv: Sequence[str], parser: ArgumentParser, unused: Collection[str] = ()
) -> list[str]:
    """Replace each `--recipe FILE` by the flags it stands for.

    Flags that follow a recipe override its flags. Where one argument of several is to be given,
    such as `--train-iters` and `--train-samples`, the command line's replaces the recipe's wherever
    it stands. A key whose value is null removes what earlier recipes say of it.

    Args:
        argv: Words of the command line.
        parser: Parser of the command.
        unused: Keys of recipes that are shared with other commands, which this one has no use for.

    Raises:
        UserError: a file that cannot be read, or a key that is no flag.
    """
    entries: list[_Entry] = []
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if name == "--recipe":
            if not equals:
                if not remaining:
                    raise UserError("--recipe needs the name of a YAML file")
                value = remaining.pop(0)
            entries += _recipe_entries(_recipe_path(value), parser, unused)
            continue
        action = parser._option_string_actions.get(name)
        words = [word]
        while remaining and not remaining[0].startswith("--"):
            words.append(remaining.pop(0))
        entries.append(_Entry(_COMMAND_LINE, action, tuple(words)))
    return [word for entry in _resolved(entries) for word in entry.words]


def _recipe_path(name: str) -> Path:
    """Return the path of a recipe: a file, or an installed one called `examples/...`."""
    path = Path(name)
    if path.parts[:1] == ("examples",) and not path.exists():
        spec = find_spec("megatron_ext.examples")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            if (installed := Path(folder, *path.parts[1:])).is_file():
                return installed
    return path


def _resolved(entries: Sequence[_Entry]) -> list[_Entry]:
    """Leave out what recipes say and a later recipe or the command line replaces."""
    kept: list[_Entry] = []
    for place, entry in enumerate(entries):
        others = [
            other
            for at, other in enumerate(entries)
            if other.source != entry.source and (at > place or other.source == _COMMAND_LINE)
        ]
        removed = any(not other.words and other.name == entry.name for other in others)
        replaced = any(other.decides and _excludes(other.name, entry.name) for other in others)
        if entry.source == _COMMAND_LINE:
            replaced = removed = False
            # `--train-iters 0` beside `--train-samples` says that steps are not what counts.
            replaced = not entry.decides and any(
                other.decides and _excludes(other.name, entry.name) for other in entries
            )
        if entry.words and not removed and not replaced:
            kept.append(entry)
    return kept


def _excludes(name: str | None, other: str | None) -> bool:
    """Return whether giving one argument replaces another."""
    if name == "split":  # goes with several sides
        return False
    for sides in _ALTERNATIVES:
        own = [side for side in sides if name in side]
        if not own or any(other in side for side in own):
            continue
        # The lengths of training choose between steps and samples, parts of a schedule do not.
        decisive = name in _LENGTHS or not set(_LENGTHS) & {*sides[0]}
        if decisive and any(other in side for side in sides):
            return True
    return False


def _recipe_entries(
    path: Path,
    parser: ArgumentParser,
    unused: Collection[str],
    including: tuple[Path, ...] = (),
) -> list[_Entry]:
    if path.resolve() in including:
        raise UserError(f"{path}: recipes are each other's base")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--recipe {path} must be a mapping of flags to values")
    entries: list[_Entry] = []
    if base := recipe.pop("base", None):
        including = (*including, path.resolve())
        entries = _recipe_entries(path.parent / str(base), parser, unused, including)
    for key, value in recipe.items():
        if str(key) not in unused:
            entries.append(_entry(str(key), value, parser, path))
    return entries


def _entry(key: str, value: Any, parser: ArgumentParser, path: Path) -> _Entry:
    """Return one key of a recipe as a flag of the command line."""
    option = "--" + key.replace("_", "-")
    action = parser._option_string_actions.get(option)
    if action is None:
        # A key may name what a negative flag turns off: `bias_swiglu_fusion: false`.
        action = next((a for a in parser._actions if a.dest == key.replace("-", "_")), None)
    if action is None or key == "recipe":
        raise UserError(f"{path}: {key} is not a flag of {parser.prog} ({_nearest(key, parser)})")
    words = [] if value is None and not _takes_none(action) else _words(key, value, action, path)
    return _Entry(path.resolve(), action, tuple(words))


def _nearest(key: str, parser: ArgumentParser) -> str:
    """Return a hint at the flag that a misspelt key may mean."""
    names = {option.removeprefix("--") for option in parser._option_string_actions}
    names = {name.replace("-", "_") for name in names if name not in ("recipe", "-h", "help")}
    found = get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.75)
    return f"did you mean {found[0]}?" if found else "see --help"


def _takes_none(action: Action) -> bool:
    """Return whether the flag itself knows the value none, which its default need not be."""
    try:
        return callable(action.type) and action.default is not None and action.type("none") is None
    except Exception:
        return False


def _words(key: str, value: Any, action: Action, path: Path) -> list[str]:
    option = "--" + key.replace("_", "-")
    if option not in action.option_strings:
        option = action.option_strings[0]
        if action.nargs == 0:
            return [option] if value == getattr(action, "const", None) else []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} must be true or false, not {value!r}")
        return [option] if value else []
    values = value if isinstance(value, list) and action.nargs else [value]
    return [option, *("none" if v is None else str(v) for v in values)]
