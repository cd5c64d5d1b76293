"""Options of reading files of other projects: which columns play which roles, and how many rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeGuard

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading files of other projects; files of this project need none.

    Attributes:
        columns: Name of a column in the files, or several with commas in between, by the name of
            the role that it plays or under which it becomes metadata.
        labels: Value of a label, as the files have it, mapped to first, second, tie or a score.
        limit: Number of records after which reading ends, in the order of the files. None for all.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    @classmethod
    def parse(
        cls, columns: Sequence[str], labels: Sequence[str] = (), limit: int | None = None
    ) -> "ReadOptions":
        """Parse the values of --columns, --labels and --limit.

        Raises:
            UserError: A value has the wrong form.
        """
        names: dict[str, str] = {}
        for words in columns:
            ours, equals, theirs = words.partition("=")
            if not (ours and equals and theirs):
                raise UserError(
                    f"--columns {words} must have the form OURS=THEIRS, such as prompt=question."
                )
            names[ours] = theirs
        values: dict[str, str] = {}
        for words in labels:
            ours, equals, theirs = words.partition("=")
            if not (equals and theirs and (ours in ("first", "second", "tie") or _is_number(ours))):
                raise UserError(
                    f"--labels {words} must have the form LABEL=VALUE with first, second, tie or a "
                    "score as LABEL, such as first=model_a."
                )
            values |= dict.fromkeys(theirs.split(","), ours)
        return cls(names, values, limit)

    def check(self, rows: Sequence[Mapping[str, Any]], path: object) -> None:
        """Check that a file has the columns and nested fields that `columns` names.

        Args:
            rows: First rows of the file.
            path: The file, for the error message.

        Raises:
            UserError: The file lacks one.
        """
        for ours, theirs in self.columns.items():
            for name in [theirs] if theirs in _fields(rows) else theirs.split(","):
                if problem := _missing_field(name, rows):
                    raise UserError(f"--columns {ours}={theirs}: {path} has {problem}")

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with the columns under the names of `columns`, those first."""
        if not self.columns:
            return dict(row)
        renamed = {ours: _value(row, theirs) for ours, theirs in self.columns.items()}
        sources = {
            name
            for theirs in self.columns.values()
            for name in ([theirs] if theirs in row else theirs.split(","))
        }
        rest = {n: v for n, v in row.items() if n not in sources and n not in renamed}
        return renamed | rest

    def shadowed(self, columns: Iterable[str]) -> list[str]:
        """Return the columns of a file that another one replaces under their name."""
        return [c for c in columns if c in self.columns and self.columns[c] != c]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _fields(values: Sequence[Any]) -> list[str]:
    """Return the fields that any of several values has, in the order of their first occurrence."""
    return list(dict.fromkeys(n for each in values if isinstance(each, Mapping) for n in each))


def _missing_field(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return which part of a name of a column or nested field no row has, or an empty text."""
    values: Sequence[Any] = rows
    before, rest = "", name
    while values:
        fields = _fields(values)
        field_name, _, following = rest.partition(".")
        if rest in fields:
            return ""
        if field_name not in fields or not following:
            where = f" in the column {before.rstrip('.')}" if before else ""
            if not fields:
                return f"no fields{where}. Name the column itself, or a column with fields."
            what = "field" if before else "column"
            near = get_close_matches(rest, fields, n=1)
            if not near and following:
                near = [f"{n}.{following}" for n in get_close_matches(field_name, fields, n=1)]
            advice = f"Did you mean {before}{near[0]}?" if near else "Name one of them."
            lacking = field_name if following and before else rest
            return f"no {what} {lacking!r}{where}; its {what}s are {', '.join(fields)}. {advice}"
        before, rest = f"{before}{field_name}.", following
        inner = [each.get(field_name) for each in values if isinstance(each, Mapping)]
        entries = [each for value in inner for each in (value if _is_list(value) else [value])]
        values = [each for each in entries if each is not None]
    return ""  # Without a value in the first rows, nothing is known about its fields.


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _value(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, of a field of a nested one, or of several by their names.

    A field of a list of mappings is the list of its values.
    """
    if name in row or ("," not in name and "." not in name):
        return row.get(name)
    if "," in name:
        return {part: _value(row, part) for part in name.split(",")}
    column, _, rest = name.partition(".")
    inner = row.get(column)
    if _is_list(inner):
        return [_value(each, rest) if isinstance(each, Mapping) else None for each in inner]
    return _value(inner, rest) if isinstance(inner, Mapping) else None
