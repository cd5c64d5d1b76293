"""Recipes: YAML files that contain flags of a command line.

This module imports neither torch nor Megatron, so that mistakes are reported at once.
"""

from argparse import Action, ArgumentParser
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError, takes_list
from megatron_ext.flag_names import FLAGS, MEGATRON_VERSION, NAMES
from megatron_ext.recipe_files import find_recipe, read_recipe, unknown_key

_COMMAND_LINE = "the command line"
_FOLDER = "${recipe_dir}"
"""Text in the values of a recipe that is replaced by the folder of its file."""

# Groups of arguments that exclude each other. If the command line or a later recipe sets an
# argument of one group, those of the other groups in earlier recipes have no effect.
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
        source: File of the recipe, `_COMMAND_LINE`, or what a message calls other words.
        action: Action of the parser, or None for words that do not belong to a flag.
        words: Flag and its values, empty if a recipe removes the flag.
    """

    source: Path | str
    action: Action | None
    words: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """Return the name of the argument."""
        return None if self.action is None else self.action.dest

    @property
    def decides(self) -> bool:
        """Return whether the entry replaces its alternatives, which a length of 0 does not."""
        value = self.words[1:] or tuple(self.words[0].split("=")[1:]) if self.words else ()
        return bool(self.words) and not (self.name in _LENGTHS and value == ("0",))


def expand_recipes(
    argv: Sequence[str],
    parser: ArgumentParser,
    unused: Collection[str] = (),
    defaults: Sequence[str] = (),
) -> list[str]:
    """Replace each `--recipe FILE` by the flags of the recipe.

    Flags that follow a recipe override its flags. If arguments exclude each other, such as
    `--train-iters` and `--train-samples`, the one on the command line replaces that of the recipe
    at any position. A key whose value is null removes the key of earlier recipes. In a value,
    `${recipe_dir}` is the folder of the recipe, so that the folder can be moved with what it names.

    Args:
        argv: Words of the command line.
        parser: Parser of the command.
        unused: Keys of shared recipes that only other commands use.
        defaults: Flags of a program, which those of the command line override as they override
            those of a recipe.

    Raises:
        UserError: A file cannot be read, or a key is not a flag.
    """
    entries = _entries(defaults, parser, "the program", unused)
    entries += _entries(argv, parser, _COMMAND_LINE, unused)
    return [word for entry in _with_context(_resolve(entries)) for word in entry.words]


def _entries(
    argv: Sequence[str], parser: ArgumentParser, source: str, unused: Collection[str]
) -> list[_Entry]:
    """Return the flags of a list of words, its recipes expanded."""
    entries: list[_Entry] = []
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if name == "--recipe":
            if not equals:
                if not remaining:
                    raise UserError("--recipe requires the name of a YAML file.")
                value = remaining.pop(0)
            entries += _recipe_entries(find_recipe(value), parser, unused)
            continue
        action = parser._option_string_actions.get(name)
        words = [word]
        while remaining and not remaining[0].startswith("--"):
            words.append(remaining.pop(0))
        entries.append(_Entry(source, action, tuple(words)))
    return entries


def check_flag_names(argv: Sequence[str]) -> None:
    """Refuse names of `pretrain_et.py` that are not flags, before Megatron is imported.

    The names are those of one version of Megatron; with another version only the parser checks
    them.

    Args:
        argv: Words of the command line.

    Raises:
        UserError: A flag or a key of a recipe does not exist, or a recipe cannot be read.
    """
    try:
        if version("megatron-core") != MEGATRON_VERSION:
            return
    except PackageNotFoundError:
        return
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--recipe":
            name = value if equals else next(words, None)
            if name is not None:
                _check_keys(find_recipe(name))
        elif flag.startswith("--") and len(flag) > 2 and " " not in flag and flag not in FLAGS:
            near = get_close_matches(flag, FLAGS, n=1)
            advice = f"Did you mean {near[0]}?" if near else "See --help."
            raise UserError(f"{flag} is not a flag of pretrain_et.py. {advice}")


def _check_keys(path: Path, including: tuple[Path, ...] = ()) -> None:
    """Refuse keys of a recipe and of its bases that are not flags."""
    recipe = read_recipe(path, including)
    if base := recipe.pop("base", None):
        _check_keys(path.parent / str(base), (*including, path.resolve()))
    for key in map(str, recipe):
        if "--" + key.replace("_", "-") not in FLAGS and key.replace("-", "_") not in NAMES:
            raise unknown_key(path, key, "pretrain_et.py", FLAGS)


def _resolve(entries: Sequence[_Entry]) -> list[_Entry]:
    """Return the entries that no later recipe and no flag of the command line replaces."""
    effective: list[_Entry] = []
    for position, entry in enumerate(entries):
        others = [
            other
            for index, other in enumerate(entries)
            if other.source != entry.source and (index > position or other.source == _COMMAND_LINE)
        ]
        removed = any(not other.words and other.name == entry.name for other in others)
        replaced = any(other.decides and _excludes(other.name, entry.name) for other in others)
        if entry.source == _COMMAND_LINE:
            replaced = removed = False
            # `--train-iters 0` together with `--train-samples` selects `--train-samples`.
            replaced = not entry.decides and any(
                other.decides and _excludes(other.name, entry.name) for other in entries
            )
        overridden = (
            entry.action is not None
            and takes_list(entry.action)
            and any(
                later.words and later.name == entry.name and later.source != entry.source
                for later in entries[position + 1 :]
            )
        )
        if entry.words and not (removed or replaced or overridden):
            effective.append(entry)
    return effective


def _with_context(entries: list[_Entry]) -> list[_Entry]:
    """Remove a context length that is below a sequence length of a later recipe or flag.

    Without `--max-position-embeddings` the context length is the sequence length.

    Raises:
        UserError: The same recipe, or the command line, sets both and they contradict each other.
    """
    length, context = (
        next((e for e in reversed(entries) if e.name == name and e.words), None)
        for name in ("seq_length", "max_position_embeddings")
    )
    if length is None or context is None or not _number(context) < _number(length):
        return entries
    later = entries.index(length) > entries.index(context) and context.source != _COMMAND_LINE
    if length.source != context.source and (later or length.source == _COMMAND_LINE):
        return [entry for entry in entries if entry.name != "max_position_embeddings"]
    raise UserError(
        f"--max-position-embeddings {_number(context):g} of {context.source} is below --seq-length "
        f"{_number(length):g} of {length.source}. Leave it out, so that it equals --seq-length."
    )


def _number(entry: _Entry) -> float:
    """Return the number of a flag, or NaN if the parser will refuse its value."""
    words = (*entry.words[0].split("=")[1:], *entry.words[1:])
    try:
        return float(words[0])
    except (ValueError, IndexError):
        return float("nan")


def _excludes(name: str | None, other: str | None) -> bool:
    """Return whether one argument replaces another."""
    if name == "split":  # belongs to several groups
        return False
    for groups in _ALTERNATIVES:
        matching_groups = [group for group in groups if name in group]
        if not matching_groups or any(other in group for group in matching_groups):
            continue
        # Only the length of training selects steps or samples; parts of a schedule do not.
        decisive = name in _LENGTHS or not set(_LENGTHS) & {*groups[0]}
        if decisive and any(other in group for group in groups):
            return True
    return False


def _recipe_entries(
    path: Path,
    parser: ArgumentParser,
    unused: Collection[str],
    including: tuple[Path, ...] = (),
) -> list[_Entry]:
    """Return the entries of a recipe, after those of its base."""
    recipe = read_recipe(path, including)
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
        # A key may be the name that a negative flag turns off: `bias_swiglu_fusion: false`.
        action = next((a for a in parser._actions if a.dest == key.replace("-", "_")), None)
    if action is None or key == "recipe":
        raise unknown_key(path, key, parser.prog, parser._option_string_actions)
    words = [] if value is None and not _takes_none(action) else _words(key, value, action, path)
    return _Entry(path.resolve(), action, tuple(words))


def _takes_none(action: Action) -> bool:
    """Return whether `none` is a value of the flag."""
    try:
        return callable(action.type) and action.default is not None and action.type("none") is None
    except Exception:
        return False


def _words(key: str, value: Any, action: Action, path: Path) -> list[str]:
    """Return a flag and its values as words of the command line."""
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
    folder = str(path.absolute().parent)
    words = ["none" if v is None else str(v).replace(_FOLDER, folder) for v in values]
    return [option, *words]
