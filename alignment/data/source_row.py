"""Rows of other projects: lookup of their columns by role, metadata and conversion to records."""

import datetime
import decimal
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from alignment.data.people_labels import PersonLabel
from alignment.data.read_options import ReadOptions
from alignment.records import Message, Pair, Prompt, Response, Side, Verdict
from megatron_ext.errors import UserError

Record = Prompt | Response | Pair | Verdict
# Names of columns by role, in order of precedence; names of one group have equal precedence.
SYNONYMS: Mapping[str, Sequence[Sequence[str]]] = {
    "messages": (("messages", "conversations", "conversation", "dialogue", "dialog"),),
    "prompt": (
        ("prompt", "question", "instruction", "query", "problem"), ("input", "context", "history"),
    ),
    "response": (("response", "completion", "output"), ("solution",), ("answer", "text")),
    "chosen": (("chosen", "preferred_output"),),
    "rejected": (("rejected", "non_preferred_output"),),
    "label": (("preferred", "winner", "preference", "better_response_id", "label", "labels"),),
    "score": (("score", "rating", "ratings"),),
    "annotator": (("annotator", "annotator_id", "rater", "labeler", "worker_id", "judge"),),
    "system": (("system", "system_prompt", "system_message"),),
}  # fmt: skip


def find_column(role: str, columns: Iterable[str], explicit: Collection[str] = ()) -> str | None:
    """Return the column that plays a role, or None.

    Case, spaces and hyphens of names are ignored.

    Args:
        role: One of the keys of `SYNONYMS`, or the name of a column.
        columns: Columns of the row.
        explicit: Roles whose column the user has named.

    Raises:
        AmbiguousColumns: Several columns may play it.
    """
    return _find_column(role, tuple(columns), role in explicit)


@lru_cache(maxsize=4096)  # the rows of a file have the same columns
def _find_column(role: str, columns: tuple[str, ...], is_explicit: bool) -> str | None:
    by_plain_name = {
        name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in columns
    }
    if is_explicit or role not in SYNONYMS:
        return role if role in columns else by_plain_name.get(role)
    for names in SYNONYMS[role]:
        matches = [by_plain_name[name] for name in names if name in by_plain_name]
        if len(matches) > 1:
            raise AmbiguousColumns(role, matches)
        if matches:
            return matches[0]
    return None


class AmbiguousColumns(UserError):
    """Several columns that may play the same role."""

    def __init__(self, role: str, columns: Sequence[str]) -> None:
        super().__init__(
            f"has the columns {' and '.join(columns)}, each of which may be the {role}. Choose one "
            f"with --columns {role}={columns[0]}."
        )


class SourceRow:
    """Row of a file, whose columns are looked up by their roles.

    Columns that are never looked up become the row's metadata.

    Attributes:
        source: Source of the row if it names none.
        options: How the file is read.
        omissions: Names of the columns and fields of the row that are left out.
        rating_roles: Roles whose column has a rating that can be read in some row of the file.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        roles: Mapping[str, str],
        source: str,
        options: ReadOptions | None = None,
        rating_roles: set[str] | None = None,
    ) -> None:
        self.rating_roles = set[str]() if rating_roles is None else rating_roles
        self._values, self._roles, self._read = values, roles, set[str]()
        self.options = options or ReadOptions()
        self.omissions: list[str] = []
        for role in ("source", "id", "prompt_id"):
            value = self.peek(role) if role in self.options.columns else None
            if isinstance(value, Mapping | list):
                raise UserError(f"{self.title(role)} must be one value, not {value!r:.60}")
        self.source = str(self.get("source") or source)

    def get(self, role: str) -> Any:
        """Return the value of the column that plays a role, or None, and count it as read."""
        name = self.column(role)
        self._read.add(name)
        return self._values.get(name)

    @property
    def columns(self) -> set[str]:
        """Columns of the row."""
        return set(self._values)

    def peek(self, role: str) -> Any:
        """Return the value of the column that plays a role, or None, without counting it."""
        return self._values.get(self.column(role))

    def assign(self, role: str, column: str) -> None:
        """Let a column play a role."""
        self._roles = {**self._roles, role: column}

    def column(self, role: str) -> str:
        """Return the name of the column that plays a role, or else the name of the role."""
        if role in self._roles:
            return self._roles[role]
        return find_column(role, self._values, self.options.columns) or role

    def title(self, role: str) -> str:
        """Return the name of the column that plays a role, as the file has it."""
        column = self.column(role)
        return self.options.columns.get(column, column)

    def metadata(self) -> dict[str, Any]:
        """Return the columns that were not read and have a value, as JSON values."""
        metadata: dict[str, Any] = {}
        read = [self._values[name] for name in self._read if name in self._values]
        conversations = [value for value in read if isinstance(value, list)]
        recorded = self._values.get("metadata")
        for name, value in self._values.items():
            if name in self._read or _is_absent(value) or value in conversations:
                continue
            if name == "metadata" and isinstance(recorded, Mapping):
                metadata |= recorded
                continue
            try:
                metadata[name] = _as_json(value)
            except TypeError:
                self.omissions.append(name)
        return metadata


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {} or value != value


def _as_json(value: Any) -> Any:
    """Return a value of a Parquet file as a value of JSON.

    Raises:
        TypeError: JSON has no such value, for example the bytes of an image.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return float(value)
        case Mapping():
            return {str(key): _as_json(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_as_json(entry) for entry in value]
    raise TypeError(type(value).__name__)


@dataclass(frozen=True)
class LabeledRecord:
    """Record with labels by people.

    Attributes:
        record: The record.
        labels: Labels and ratings by people; empty if the data has none.
        number: Number of its row in the file.
    """

    record: Record
    labels: Sequence[PersonLabel] = ()
    number: int = 0


def hash_id(*parts: object) -> str:
    """Return an id that depends on the parts only, for records without one."""
    return sha256(repr(parts).encode()).hexdigest()[:32]


def prompt_of(
    messages: Sequence[Message],
    source: str,
    id: object = None,
    rubric: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Prompt:
    """Return a prompt of messages that have been checked.

    Args:
        messages: Messages of the prompt.
        source: Source of the prompt.
        id: Id of the prompt. Default: a hash of the messages.
        rubric: Requirements that judges apply to the responses.
        metadata: Further columns. Default: none.
    """
    plain = [(message.role, message.content) for message in messages]
    name = str(id) if id is not None else hash_id(plain)
    return Prompt(name, messages, source, rubric, metadata or {})


def pair_of(
    prompt: Prompt, chosen: str, rejected: str, source: str, id: object = None, equal: bool = False
) -> Pair:
    """Return a pair whose order of responses reveals nothing about which one is better.

    Args:
        prompt: Prompt of the pair.
        chosen: Response that is labeled as better.
        rejected: Response that is labeled as worse.
        source: Source of the pair.
        id: Id of the pair. Default: a hash of the prompt's id and the responses.
        equal: Whether the label is a tie.
    """
    name = str(id) if id is not None else hash_id(prompt.id, chosen, rejected)
    # The order depends on the texts only, neither on the label nor on the id in the source.
    chosen_first = sha256(f"{prompt.id}\0{min(chosen, rejected)}".encode()).digest()[0] % 2 == 0
    if chosen > rejected:
        chosen_first = not chosen_first
    first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
    preferred = None if equal else Side.FIRST if chosen_first else Side.SECOND
    return Pair(name, prompt, first, second, preferred, source, equal)
