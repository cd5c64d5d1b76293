"""Changes of Megatron and torch at run time, applied from one table.

`megatron_ext.patches.table` lists the patches: the attribute that is replaced, why, whether the
problem is known upstream, and when the patch can be removed. The replacements are defined in the
modules of their subjects, by the function that an entry names as its source.

No attribute is patched by two entries, so the order of groups does not matter.
"""

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from megatron_ext.patches.table import PATCHES, Group

_originals: dict[str, Any] = {}
_applied: set[Group] = set()
_MISSING = object()


def apply(group: Group, *context: Any) -> None:
    """Apply the patches of a group until the process ends.

    Applying a group again does nothing if it has no context. With a context, the new replacements
    take the place of the earlier ones; they do not wrap them.

    Args:
        group: Name of the group.
        context: Arguments of the functions that return the replacements.

    Raises:
        AttributeError: A target does not exist in the installed version.
    """
    if group in _applied and not context:
        return
    for target, replacement in _replacements(group, context):
        owner, name = locate(target)
        _originals.setdefault(target, _read(owner, name))
        _write(owner, name, replacement)
        if _is_rebound(target):
            _rebind_in_submodules(owner, name, _originals[target], replacement)
    _applied.add(group)


@contextmanager
def applied(group: Group, *context: Any) -> Iterator[None]:
    """Apply the patches of a group for the duration of a block.

    Args:
        group: Name of the group.
        context: Arguments of the functions that return the replacements.
    """
    with ExitStack() as stack:
        for target, replacement in _replacements(group, context):
            stack.enter_context(patched(*locate(target), replacement))
        yield


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object, or an item of a mapping, for the duration of a block.

    Args:
        owner: Object or mapping of this project. Patches of Megatron and torch belong in the
            table.
        name: Name of the attribute or key of the item.
        value: Its value inside the block.
    """
    before = (
        owner.get(name, _MISSING)
        if isinstance(owner, MutableMapping)
        else _own_attribute(owner, name)
    )
    _write(owner, name, value)
    try:
        yield
    finally:
        if before is not _MISSING:
            _write(owner, name, before)
        elif isinstance(owner, MutableMapping):
            del owner[name]
        else:
            delattr(owner, name)


def original(target: str) -> Any:
    """Return the value that a target had before the table replaced it.

    Args:
        target: Dotted path of an attribute, as in the table.
    """
    return _originals[target] if target in _originals else _read(*locate(target))


def locate(target: str) -> tuple[Any, str]:
    """Return the owner of a target and the target's name in it.

    Args:
        target: Dotted path of an attribute of a module or class, or of an item of a dictionary.

    Raises:
        AttributeError: The owner has no such attribute.
    """
    parts = target.split(".")
    owner: Any = None
    for end in range(len(parts) - 1, 0, -1):
        try:
            owner = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            owner = _read(owner, part)
        break
    if owner is None:
        raise AttributeError(f"{target} does not exist: no module of that path can be imported")
    _read(owner, parts[-1])
    return owner, parts[-1]


def _replacements(group: Group, context: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the targets of a group and their replacements, in the order of the table."""
    entries = [patch for patch in PATCHES if patch.group == group]
    for source in dict.fromkeys(patch.source for patch in entries):
        module, function = source.split(":")
        replacements = getattr(import_module(module), function)(*context)
        listed = {target for patch in entries if patch.source == source for target in patch.targets}
        if unlisted := replacements.keys() - listed:
            raise AttributeError(f"{source} replaces {', '.join(sorted(unlisted))}: not in table")
        yield from replacements.items()


def _is_rebound(target: str) -> bool:
    """Return whether submodules that imported the target get the replacement too."""
    return any(patch.in_submodules for patch in PATCHES if target in patch.targets)


def _rebind_in_submodules(owner: Any, name: str, before: Any, value: Any) -> None:
    """Replace an object in all submodules of its module that have it under the same name."""
    prefix = f"{owner.__name__}."
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(prefix) and vars(module).get(name) is before:
            setattr(module, name, value)


def _read(owner: Any, name: str) -> Any:
    """Return an attribute of an object, or an item of a mapping."""
    if isinstance(owner, MutableMapping):
        if name not in owner:
            raise AttributeError(f"there is no item {name}")
        return owner[name]
    return getattr(owner, name)


def _write(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object, or an item of a mapping."""
    if isinstance(owner, MutableMapping):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _own_attribute(owner: Any, name: str) -> Any:
    """Return the attribute of the object itself, or `_MISSING` if it inherits the attribute."""
    getattr(owner, name)  # a name that does not exist is an error, not a new attribute
    return vars(owner).get(name, _MISSING) if hasattr(owner, "__dict__") else getattr(owner, name)
