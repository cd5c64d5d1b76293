"""Errors about columns that a file does not have, with the nearest names."""

from collections.abc import Iterable
from difflib import get_close_matches

from megatron_ext.errors import UserError

_SHOWN = 12


def missing_column(path: str, name: str, columns: Iterable[str], flag: str) -> UserError:
    """Return the error for a column (JSON: a key) that a file does not have.

    Args:
        path: The file.
        name: The requested column.
        columns: The columns of the file.
        flag: Flag that names the column, for the error message.
    """
    names = list(dict.fromkeys(columns))
    lower = {column.lower(): column for column in names}
    near = [lower[match] for match in get_close_matches(name.lower(), lower, n=2)]
    question = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    column_list = ", ".join(map(repr, names[:_SHOWN])) or "none"
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return UserError(
        f"{path} has no column {name!r}.{question} Set {flag} to one of its columns: "
        f"{column_list}{rest}."
    )
