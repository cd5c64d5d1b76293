"""Command lines described by dataclasses: each field is a flag, its docstring is the help text.

    @dataclass(frozen=True, kw_only=True)
    class ReportConfig:
        study: str = flag(positional=True, metavar="STUDY")
        "Folder of a study or of a run."
        threads: int = flag(1, at_least=1)
        "Number of threads that draw pictures."

    config = parse_config(ReportConfig, argv, "et-align report", __doc__)

A field whose type is a dataclass is a group of flags, so that commands share groups. The default is
added to the help text. Checks of one value are arguments of `flag`, checks of several values go
into `__post_init__`, which raises `UserError`.

This module is used instead of tyro for three reasons. tyro ends the program itself, and prints a
box of several lines instead of one sentence. It does not support flags with an optional value
(`--dry-run [RANKS]`). And `megatron_ext.recipes` checks recipes against an `argparse` parser, which
tyro no longer has.
"""

import ast
import inspect
import math
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_ext.errors import ToolParser, UserError
from megatron_ext.recipes import expand_recipes

Resume = Literal["must match", "may change"]
_LARGEST = 10**15  # whole number; products with other numbers fit into 64 bits


def flag(
    default: Any = MISSING,
    *,
    resume: Resume | None = None,
    name: str | None = None,
    short: str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    repeat: bool = False,
    several: bool = False,
    choices: Sequence[str] | None = None,
    value_if_bare: Callable[[], Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return the field of a flag.

    Args:
        default: Value if the flag is absent. A flag without a default is required.
        resume: Whether a run that is resumed must have the same value.
        name: Name on the command line. Default: the field's, with hyphens.
        short: Second, short name on the command line, such as -n.
        metavar: Placeholder for the value in the help.
        positional: Whether the value is a positional argument. With a default it is optional.
        repeat: Whether the flag is repeated for several values instead of taking several at once.
        several: Whether a flag that can be repeated also takes several values at once.
        choices: Permitted values from a registry; for other values use a Literal type.
        value_if_bare: Function that returns the value of the flag if none follows it.
        at_least: Smallest value.
        above: Exclusive lower bound.
        at_most: Largest value.
        below: Exclusive upper bound.
    """
    metadata = {
        "resume": resume,
        "name": name,
        "short": short,
        "metavar": metavar,
        "positional": positional,
        "repeat": repeat,
        "several": several,
        "choices": choices,
        "value_if_bare": value_if_bare,
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
    }
    return field(default=default, metadata=metadata)


def must_match(default: Any = MISSING, **settings: Any) -> Any:
    """Return the field of a flag whose value a resumed run must have again."""
    return flag(default, resume="must match", **settings)


def may_change(default: Any = MISSING, **settings: Any) -> Any:
    """Return the field of a flag whose value may change when a run is resumed."""
    return flag(default, resume="may change", **settings)


def group(**defaults: Any) -> Any:
    """Return the field of a group of flags, some with a default of this command."""
    return field(metadata={"defaults": defaults})


@dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        place: Names of the fields on the path from the configuration to the flag's field.
        type: Type of the value.
        default: Value if the flag is absent; MISSING if it is required.
        group: Summary of the group that it belongs to.
    """

    field: Field[Any]
    place: tuple[str, ...]
    type: Any
    default: Any
    help: str
    group: str

    @property
    def name(self) -> str:
        """Name of the field."""
        return self.place[-1]

    @property
    def option(self) -> str:
        """Name on the command line."""
        if self.field.metadata.get("positional"):
            return self.name
        name = self.field.metadata.get("name") or self.name.replace("_", "-")
        return f"--no-{name}" if self.type is bool and self.default is True else f"--{name}"

    @property
    def resume(self) -> Resume | None:
        """Whether a run that is resumed must have the same value."""
        mark: Resume | None = self.field.metadata.get("resume")
        return mark

    def check(self, value: Any) -> None:
        """Raise a `UserError` if a text is empty, or a number not finite or out of its bounds."""
        for each in value if isinstance(value, list | tuple) else (value,):
            if each == "" and self.default != "":
                raise UserError(f"{self.option} is empty. Give a value, or leave the flag out.")
            if isinstance(each, int | float) and not isinstance(each, bool):
                self._check_number(each)

    def _check_number(self, value: float) -> None:
        bounds = self.field.metadata.get("bounds", {})
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        fits = {
            "at least": lambda bound: value >= bound,
            "above": lambda bound: value > bound,
            "at most": lambda bound: value <= bound,
            "below": lambda bound: value < bound,
        }
        if not all(fits[name](bound) for name, bound in bounds.items()):
            required = " and ".join(f"{name} {bound:.10g}" for name, bound in bounds.items())
            raise UserError(f"{self.option} {value} must be {required}.")
        if not math.isfinite(value):
            raise UserError(f"{self.option} {value} must be a finite number.")
        if abs(value) > _LARGEST and isinstance(value, int):
            raise UserError(f"{self.option} {value} must be at most {_LARGEST}.")


def flags_of(config: type, **defaults: Any) -> Iterator[Flag]:
    """Yield the flags of a configuration and of its groups.

    Args:
        config: A dataclass.
        **defaults: Defaults that replace those of the fields.
    """
    types, documentation = get_type_hints(config), _field_docstrings(config)
    for entry in fields(config):
        kind = types[entry.name]
        if is_dataclass(kind):
            for inner in flags_of(kind, **entry.metadata.get("defaults", {})):  # type: ignore[arg-type]
                summary = inner.group or (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
                place = (entry.name, *inner.place)
                yield Flag(inner.field, place, inner.type, inner.default, inner.help, summary)
            continue
        default = defaults.get(entry.name, entry.default)
        yield Flag(entry, (entry.name,), kind, default, documentation.get(entry.name, ""), "")


def parse_config[Config](
    config: type[Config],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None,
    unused: Collection[str] = (),
) -> Config:
    """Read a command line, with its recipes.

    Args:
        config: A dataclass.
        argv: Words after the command's name. Default: those of the program.
        prog: Name of the command.
        description: Text of the help above the flags.
        unused: Keys of recipes shared with other commands, which this one ignores.

    Raises:
        UserError: A flag is unknown, missing or has a wrong value.
    """
    parser = build_parser(config, prog, description)
    entries = list(flags_of(config))
    if any(entry.name == "recipe" for entry in entries):
        assert argv is not None, "commands with recipes must pass argv"
        argv = expand_recipes(argv, parser, unused)
    values = vars(parser.parse_args(argv))
    for entry in entries:
        entry.check(values[entry.name])
    return _build(config, values)


def flag_values(config: Any) -> dict[str, Any]:
    """Return the value of each flag of a configuration and of its groups, by name."""
    values: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        values |= flag_values(value) if is_dataclass(value) else {entry.name: value}
    return values


def _build[Config](config: type[Config], values: dict[str, Any]) -> Config:
    """Return a configuration, made from its innermost groups outward."""
    types = get_type_hints(config)
    arguments: dict[str, Any] = {}
    for entry in fields(config):  # type: ignore[arg-type]
        kind = types[entry.name]
        if is_dataclass(kind):
            arguments[entry.name] = _build(kind, values)  # type: ignore[arg-type]
        else:
            value = values[entry.name]
            arguments[entry.name] = tuple(value) if isinstance(value, list) else value
    return config(**arguments)


def build_parser(config: type, prog: str, description: str | None) -> ArgumentParser:
    """Return the parser of a configuration."""
    parser = ToolParser(
        prog=prog,
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser}
    for entry in flags_of(config):
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        short = entry.field.metadata.get("short")
        names = [short, entry.option] if short else [entry.option]
        groups[entry.group].add_argument(*names, **_argument(entry))
    return parser


def _argument(entry: Flag) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a flag."""
    metadata, kind, default = entry.field.metadata, entry.type, entry.default
    argument: dict[str, Any] = {"help": (entry.help + _shown_default(entry)).replace("%", "%%")}
    if not metadata.get("positional"):
        argument |= {"dest": entry.name, "required": default is MISSING}
    if default is not MISSING:
        argument["default"] = default
    if kind is bool:
        return argument | {"action": "store_false" if default else "store_true"}
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        kind, *others = get_args(kind)
        if metadata.get("repeat"):
            # argparse appends to a copy of the default, which must be a list.
            argument |= {"action": "append", "default": list(default)}
            if metadata.get("several"):
                argument |= {"action": "extend", "nargs": "+"}
        else:
            any_number = "*" if metadata.get("value_if_bare") else "+"
            argument["nargs"] = any_number if others == [Ellipsis] else 1 + len(others)
    elif metadata.get("positional") and default is not MISSING:
        argument["nargs"] = "?"
    elif bare := metadata.get("value_if_bare"):
        argument |= {"nargs": "?", "const": bare()}
    if get_origin(kind) is Literal:
        argument["choices"] = list(get_args(kind))
        kind = type(argument["choices"][0])
    elif metadata.get("choices"):
        argument["choices"] = list(metadata["choices"])
    if metadata.get("metavar"):
        names = tuple(metadata["metavar"].split())
        argument["metavar"] = names if isinstance(argument.get("nargs"), int) else names[0]
    return argument | {"type": kind}


def _shown_default(entry: Flag) -> str:
    """Return the sentence on the default, or an empty string if the docstring has one."""
    if entry.default is MISSING or "Default:" in entry.help or not entry.help:
        return ""
    if entry.type is bool:
        return ""
    if entry.default in (None, "", ()):
        return " Default: none."
    default = (
        " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    )
    return f" Default: {default}."


@cache
def _field_docstrings(config: type) -> dict[str, str]:
    """Return the string below each field of a class and of its bases, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:]):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            if isinstance(statement.target, ast.Name) and isinstance(after.value, ast.Constant):
                texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts
