"""Schemas of data sets, by which rows of other projects become records.

The columns of a file determine its schema. A row without an id gets the hash of its content.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from alignment.data import preference_rows, response_rows
from alignment.data.people_labels import PersonLabel
from alignment.data.preference_rows import find_sides
from alignment.data.read_options import ReadOptions
from alignment.data.source_row import (
    SYNONYMS,
    AmbiguousColumns,
    LabeledRecord,
    Record,
    SourceRow,
    find_column,
)
from alignment.records import Pair, Prompt, Response, Verdict
from megatron_ext.data.row_files import MalformedRow, read_rows
from megatron_ext.errors import UserError

Roles = Mapping[str, str]
_PEEKED = 100  # rows whose columns --columns may name


@dataclass(frozen=True)
class DatasetSchema:
    """Columns of rows of another project, and their conversion to records.

    Attributes:
        name: Name of the schema in the output of commands.
        columns: Columns that a row must have, as the documentation names them.
        match: Function that returns the column of each required role, or None if the columns of
            a file, its first argument, lack one. Its second argument is the roles that the user
            has named.
        convert: Function that converts a row.
        further_roles: Roles of further columns that the conversion uses.
    """

    name: str
    columns: str
    match: Callable[[Collection[str], Collection[str]], Roles | None]
    convert: Callable[[SourceRow], list[LabeledRecord]]
    further_roles: Collection[str] = ()


def _requires(*roles: str) -> Callable[[Collection[str], Collection[str]], Roles | None]:
    """Return the match of a schema that requires columns of these roles."""

    def match(columns: Collection[str], explicit: Collection[str]) -> Roles | None:
        columns_by_role: dict[str, str] = {}
        for role in roles:
            column = find_column(role, columns, explicit)
            if column is None:
                return None
            columns_by_role[role] = column
        return columns_by_role

    return match


def _match_sides(columns: Collection[str], explicit: Collection[str]) -> Roles | None:
    sides = find_sides(columns)
    if {"first", "second"} <= set(columns):
        sides = "first", "second"
    return None if sides is None else {"first": sides[0], "second": sides[1]}


def _match_alpaca(columns: Collection[str], explicit: Collection[str]) -> Roles | None:
    context = find_column("input", columns) or find_column("context", columns)
    prompt = find_column("instruction", columns)
    if "prompt" in explicit:
        prompt = "prompt" if "input" in explicit else None
    response = find_column("response", columns, explicit)
    if prompt is None or (context is None and response is None):
        return None
    roles = {"prompt": prompt} | ({"input": context} if context else {})
    return roles | ({"response": response} if response else {})


def _match_conversations(columns: Collection[str], explicit: Collection[str]) -> Roles | None:
    if "prompt" in explicit and "messages" not in explicit:
        return None
    return _requires("messages")(columns, explicit)


_ROLES = {
    "prompt", "response", "chosen", "rejected", "messages", "system", "input", "first", "second",
    "label", "score", "annotator", "rubric", "id", "prompt_id", "source",
}  # fmt: skip
_ABOUT_ROW = ("system", "id", "prompt_id", "rubric", "source")
_PROMPT = ("prompt", "messages", *_ABOUT_ROW)
_RATED = ("score", "label", "annotator")
SCHEMAS = (
    DatasetSchema(
        "preferences", "chosen, rejected", _requires("chosen", "rejected"),
        preference_rows.preference, (*_PROMPT, "annotator"),
    ),
    DatasetSchema(
        "pairs", "two responses, such as response_a, response_b", _match_sides,
        preference_rows.labeled_pair, (*_PROMPT, "label", "annotator"),
    ),
    DatasetSchema(
        "questions of Arena-Hard", "uid, category, subcategory, prompt",
        _requires("uid", "category", "subcategory", "prompt"), response_rows.arena_hard,
    ),
    DatasetSchema(
        "prompts with completions", "prompt, completions", _requires("prompt", "completions"),
        response_rows.completions, (*_PROMPT, "score", "annotator"),
    ),
    DatasetSchema(
        "Alpaca", "instruction, input, output", _match_alpaca, response_rows.alpaca,
        (*_ABOUT_ROW, *_RATED),
    ),
    DatasetSchema(
        "prompts and responses", "prompt or question, response or answer",
        _requires("prompt", "response"), response_rows.answered, (*_PROMPT, *_RATED),
    ),
    DatasetSchema(
        "conversations", "messages or conversations", _match_conversations, response_rows.chat,
        (*_ABOUT_ROW, *_RATED),
    ),
    DatasetSchema(
        "prompts", "prompt or question", _requires("prompt"), response_rows.prompt_only, _PROMPT
    ),
)  # fmt: skip


class RecordFile:
    """File of records of this project, or of rows of another one, that is read as a stream.

    Attributes:
        path: The file.
        columns: Columns of its first rows, for a file of another project.
        roles: Column of each required role, for a file of another project.
        schema: Schema of such a file. None before it is read, and for a file of this project.
        omissions: Number of rows with a value, for each column or field that is left out.
        metadata: Number of rows with a value, for each column of the metadata.
        labels: Number of labels of each person.
    """

    def __init__(
        self, path: str | Path, source: str = "", options: ReadOptions | None = None
    ) -> None:
        """Prepare the reading.

        Args:
            path: File to read.
            source: Source of rows that name none. Default: the file's name.
            options: How a file of another project is read.
        """
        self.path, self.options = path, options or ReadOptions()
        self.source = source or Path(path).name.partition(".")[0]
        self.schema: DatasetSchema | None = None
        self.columns: list[str] = []
        self.roles: Roles = {}
        self.omissions: Counter[str] = Counter()
        self.metadata: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self._rating_roles: set[str] = set()

    def read(
        self, report_progress: Callable[[int], None] = lambda consumed: None
    ) -> Iterator[LabeledRecord | MalformedRow]:
        """Yield the records of the file with their labels, or a `MalformedRow` in their place.

        Args:
            report_progress: Function that is called now and then with the number of bytes read.

        Raises:
            UserError: The file cannot be read, or its schema is unknown.
        """
        rows = read_rows(self.path, report_progress)
        first = list(islice(rows, _PEEKED))
        valid = [row for _, row in first if not isinstance(row, MalformedRow)]
        if not valid:
            self._raise_empty([row for _, row in first if isinstance(row, MalformedRow)])
        kind = own_kind(valid[0])
        if kind is None:
            # A column may be missing in rows where it has no value.
            self.columns = list(dict.fromkeys(name for row in valid for name in row))
            self.options.check(valid, self.path)
            self.schema, self.roles = self._find_schema(self.options.rename(valid[0]))
            self._check_roles(self.schema, self.roles)
            if "score" in self.schema.further_roles:
                for example in valid:
                    with suppress(UserError):
                        response_rows.note_ratings(self._source_row(example))
        for number, row in chain(first, rows):
            if isinstance(row, MalformedRow):
                yield row
                continue
            try:
                if kind:
                    record = kind.from_row(row)
                    records = [LabeledRecord(record, labels_of(record), number)]
                else:
                    records = self._convert(row, number)
            except UserError as error:
                yield MalformedRow(number, str(error))
                continue
            yield from records

    def _raise_empty(self, malformed: list[MalformedRow]) -> None:
        if malformed:
            raise UserError(f"{self.path}, {malformed[0]}")
        raise UserError(f"{self.path} has no rows. Give a file with rows.")

    def _find_schema(self, row: Mapping[str, Any]) -> tuple[DatasetSchema, Roles]:
        columns = list(row)
        explicit = self.options.columns
        # Roles that the user names choose the schema; other columns may look like another one.
        candidates = [schema for schema in SCHEMAS if _fits_named(schema, columns, explicit)]
        try:
            for schema in candidates or SCHEMAS:
                if (roles := schema.match(columns, explicit)) is not None:
                    return schema, roles
        except AmbiguousColumns as error:
            raise UserError(f"{self.path} {error}") from None
        raise UserError(_unknown(self.path, columns, explicit))

    def _check_roles(self, schema: DatasetSchema, roles: Roles) -> None:
        """Check that the schema uses every role whose column the user has named.

        Raises:
            UserError: It ignores one.
        """
        explicit = self.options.columns
        known = [*roles, *(role for role in schema.further_roles if role not in roles)]
        for role in sorted((_ROLES & set(explicit)) - {*known, *roles.values()}):
            raise UserError(
                f"--columns {role}={explicit[role]}: {self.path} is read as {schema.name} "
                f"({schema.columns}), which have no {role}. Leave it out, or name one of their "
                f"roles: {', '.join(known)}."
            )
        if {"score", "label"} <= set(explicit) and "score" in known:
            raise UserError(
                f"--columns score={explicit['score']} label={explicit['label']}: both name the "
                f"ratings of {self.path}. Leave one out; columns of several people are "
                "score=COLUMN,COLUMN."
            )

    def _convert(self, values: Mapping[str, Any], number: int) -> list[LabeledRecord]:
        assert self.schema is not None
        shadowed = self.options.shadowed(values)
        row = self._source_row(values)
        if missing := [name for name in self.roles.values() if name not in row.columns]:
            raise UserError(f"no {missing[0]!r}, which the rows before it have")
        records = self.schema.convert(row)
        for item in records:
            _check_texts(item.record, self.roles)
        if row.omissions or shadowed:
            self.omissions.update(dict.fromkeys([*row.omissions, *shadowed], 1))
        record = records[0].record
        assert not isinstance(record, Verdict)
        prompt = record if isinstance(record, Prompt) else record.prompt
        if prompt.metadata:
            self.metadata.update(list(prompt.metadata))
        for item in records:
            for label in item.labels:
                self.labels[label.annotator] += 1
        return [LabeledRecord(item.record, item.labels, number) for item in records]

    def _source_row(self, values: Mapping[str, Any]) -> SourceRow:
        values = self.options.rename(values)
        return SourceRow(values, self.roles, self.source, self.options, self._rating_roles)

    @property
    def description(self) -> str:
        """Return the schema by which the file was read, with the columns of the roles."""
        assert self.schema is not None
        names = {role: self.options.columns.get(c, c) for role, c in self.roles.items()}
        columns = ", ".join(c if role == c else f"{role}={c}" for role, c in names.items())
        return f"{self.schema.name} ({columns})"

    def missing_answer(self, prompt: Prompt) -> tuple[str, str]:
        """Return why a row of the file is a prompt without an answer, and what to do."""
        if "messages" in self.roles:
            senders = ", ".join(message.role for message in prompt.messages)
            reason = f"there is no answer of the assistant after the messages of {senders}"
            return reason, "Remove the row, or add the answer to its messages."
        texts = [name for name, value in prompt.metadata.items() if isinstance(value, str)]
        column = texts[0] if len(texts) == 1 else "COLUMN"
        reason = f"there is no answer of the assistant in the columns {', '.join(self.columns)}"
        return reason, f"Name the column of the answer with --columns response={column}."

    def as_prompt(self, record: Response | Pair) -> Prompt:
        """Return the prompt of a record, with the answer of a row in its metadata.

        The answer has the key `reference` there, and also the name of its column.
        """
        if not isinstance(record, Response) or self.schema is None:
            return record.prompt
        column = self.roles.get("response", "reference")
        answer = {"reference": record.text, self.options.columns.get(column, column): record.text}
        return replace(record.prompt, metadata=answer | dict(record.prompt.metadata))


def _check_texts(record: Record, roles: Roles) -> None:
    """Check that neither the prompt of a record nor a response is empty.

    Raises:
        UserError: One has no text but white space.
    """
    assert not isinstance(record, Verdict)
    prompt = record if isinstance(record, Prompt) else record.prompt
    last = prompt.messages[-1]
    if last.role == "user" and not last.content.strip():  # a tool may print nothing
        raise UserError("the prompt is empty")
    if isinstance(record, Response) and not record.text.strip():
        raise UserError("the response is empty")
    if isinstance(record, Pair) and not (record.first.strip() and record.second.strip()):
        sides = ("chosen", "rejected") if "chosen" in roles else ("first", "second")
        raise UserError(f"the {sides[0]} or the {sides[1]} response is empty")


def _fits_named(schema: DatasetSchema, columns: Collection[str], explicit: Collection[str]) -> bool:
    """Return whether a schema requires a column that the user has named, and fits all of them."""
    try:
        roles = schema.match(columns, explicit)
    except AmbiguousColumns:
        return False
    required = {"messages", "chosen", "rejected", "first", "second", "response"} & set(explicit)
    return bool(required) and roles is not None and required <= set(roles)


def own_kind(row: Mapping[str, Any]) -> type[Record] | None:
    """Return the kind of record of this project that a row is, or None if it is of another one."""
    columns = set(row)
    if {"item", "outcome"} <= columns:
        return Verdict
    if isinstance(row.get("prompt"), Mapping) and "messages" in row["prompt"]:
        if {"first", "second"} <= columns:
            return Pair
        return Response if "text" in columns else None
    fields = {"id", "messages", "source", "rubric"}
    return Prompt if fields <= columns <= fields | {"metadata"} else None


def labels_of(record: Record) -> list[PersonLabel]:
    """Return the label that the author of the data gave to a pair, as a list of at most one."""
    if isinstance(record, Pair) and (record.tied or record.preferred is not None):
        return [PersonLabel.of_side(record.preferred)]
    return []


def _unknown(path: str | Path, columns: Collection[str], explicit: Mapping[str, str]) -> str:
    names = {name for groups in SYNONYMS.values() for group in groups for name in group}
    near = {c: match[0] for c in columns if (match := get_close_matches(c.lower(), names, 1, 0.75))}
    roles = {name: role for role, groups in SYNONYMS.items() for group in groups for name in group}
    advice = [f"{roles[name]}={explicit.get(column, column)}" for column, name in near.items()]
    schemas = "; ".join(f"{schema.columns} ({schema.name})" for schema in SCHEMAS)
    return (
        f"{path} has the columns {', '.join(columns) or '(none)'}, which no known schema has. Name "
        f"them with --columns {' '.join(advice) or 'prompt=COLUMN response=COLUMN'}. Known are "
        f"{schemas}."
    )


def read_records(
    path: str | Path,
    source: str = "",
    report_progress: Callable[[int], None] = lambda consumed: None,
    options: ReadOptions | None = None,
) -> Iterator[Record | MalformedRow]:
    """Yield the records of a file of any known schema; see `RecordFile`.

    Args:
        path: File to read.
        source: Source of rows that name none. Default: the file's name.
        report_progress: Function that is called now and then with the number of bytes read so far.
        options: How a file of another project is read.

    Yields:
        A record, or a `MalformedRow` for a row that cannot be converted.

    Raises:
        UserError: The file cannot be read, or its schema is unknown.
    """
    for item in RecordFile(path, source, options).read(report_progress):
        yield item if isinstance(item, MalformedRow) else item.record
