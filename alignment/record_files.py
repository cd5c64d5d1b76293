"""Reader of files whose records must all be valid, before anything is paid for or measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.data.dataset_schemas import RecordFile
from alignment.data.read_options import ReadOptions
from alignment.data.source_row import LabeledRecord, Record
from alignment.records import Pair, Prompt, Response, Verdict
from megatron_ext.console import console
from megatron_ext.data.row_files import MalformedRow, expand_row_files
from megatron_ext.errors import UserError

_FEW = 6  # names of columns that a line shows


def read_all[R: Record](path: Path, *kinds: type[R], options: ReadOptions | None = None) -> list[R]:
    """Return the records of a file or folder, which are all of one kind; see `read_files`."""
    return read_files([str(path)], *kinds, options=options)


def read_files[R: Record](
    paths: Sequence[str], *kinds: type[R], options: ReadOptions | None = None
) -> list[R]:
    """Return the records of files, which are all of one kind.

    Rows of other projects become records, and a line on standard output says how: rows that repeat
    an earlier one are left out, and where prompts are read, the prompts of responses and pairs are
    taken.

    Args:
        paths: Files, globs and folders.
        *kinds: The kinds that the files may hold.
        options: How files of other projects are read, and how many records.

    Raises:
        UserError: A row is malformed or of another kind, an id occurs twice, or there is no row.
    """
    items = read_labeled(paths, *kinds, options=options)
    return [item.record for item in items if isinstance(item.record, kinds)]


def read_labeled(
    paths: Sequence[str], *kinds: type[Any], options: ReadOptions | None = None
) -> list[LabeledRecord]:
    """Return the records of files with the labels of people; see `read_files`.

    The labels of rows that repeat an item, as those of several annotators do, are joined.
    """
    options = options or ReadOptions()
    reader = _StrictReader(kinds, options)
    for path in expand_row_files([str(path) for path in paths], flag=""):
        reader.read(path)
    return reader.items


class _StrictReader:
    """Reader of files one after the other.

    Attributes:
        items: The records so far, each once.
    """

    def __init__(self, kinds: Sequence[type[Any]], options: ReadOptions) -> None:
        self.items: list[LabeledRecord] = []
        self._kinds, self._options = tuple(kinds), options
        self._foreign: dict[str, int] = {}  # places of records of other projects by id

    def read(self, path: str) -> None:
        """Read a file.

        Raises:
            UserError: A row cannot be used, or the file has no row.
        """
        file, own_ids = RecordFile(path, options=self._options), set[str]()
        before, repeated, equal = len(self.items), 0, 0
        for item in file.read():
            if self._options.limit is not None and len(self.items) >= self._options.limit:
                break
            if isinstance(item, MalformedRow):
                raise UserError(f"{path}, {item}. Correct the row, or remove it.")
            item = self._as_kind(file, item)
            record = item.record
            if isinstance(record, Verdict):
                self.items.append(item)
            elif file.schema is None:
                if record.id in own_ids:
                    raise UserError(
                        f"{path} has the id {record.id!r} twice. Remove one of the rows."
                    )
                own_ids.add(record.id)
                self.items.append(item)
            elif isinstance(record, Pair) and record.first == record.second:
                equal += 1
            elif record.id in self._foreign:
                self._repeat(path, self._foreign[record.id], item)
                repeated += 1
            else:
                self._foreign[record.id] = len(self.items)
                self.items.append(item)
        if file.schema is not None and os.environ.get("RANK", "0") == "0":
            counts = {
                "more rows repeat one of them": repeated,
                "pairs of a response with itself are left out": equal,
            }
            console.line(describe(file, len(self.items) - before, counts))
        if not self.items:
            raise UserError(f"{path} has no rows. Give a file with rows.")

    def _as_kind(self, file: RecordFile, item: LabeledRecord) -> LabeledRecord:
        """Return a record as one of the kinds that the files may hold."""
        record = item.record
        prompts_only = file.schema is not None and self._kinds == (Prompt,)
        if prompts_only and isinstance(record, Response | Pair):
            return replace(item, record=file.as_prompt(record))
        first = self.items[0].record if self.items else record
        if isinstance(record, self._kinds) and type(record) is type(first):
            return item
        allowed = " or ".join(f"{kind.__name__.lower()}s" for kind in self._kinds)
        if file.schema is not None and isinstance(record, Prompt):
            reason, advice = file.missing_answer(record)
            raise UserError(
                f"{file.path}, row {item.number:,}: {reason}, and the command reads {allowed}. "
                f"{advice}"
            )
        advice = ""
        if isinstance(record, Pair) and self._kinds == (Response,):
            advice = ". Convert pairs with et-align data import --as chosen."
        raise UserError(
            f"{file.path} must hold {allowed} of one kind, and row {item.number:,} is a "
            f"{type(record).__name__.lower()}{advice}"
        )

    def _repeat(self, path: str, place: int, item: LabeledRecord) -> None:
        """Join the labels of a row to those of the record that it repeats.

        Raises:
            UserError: The record with the same id is another one.
        """
        earlier = self.items[place]
        if not same_content(earlier.record, item.record):
            assert not isinstance(item.record, Verdict)
            raise UserError(
                f"{path}, row {item.number:,}: an earlier row with other texts has the id "
                f"{item.record.id!r} too. Make the ids unique, or name the column otherwise, as "
                "in --columns group=id."
            )
        labels = [*earlier.labels, *item.labels]
        self.items[place] = replace(
            earlier, record=_undecided(earlier.record, item.record), labels=labels
        )


def _undecided(record: Record, other: Record) -> Record:
    """Return a pair without the preference that another label contradicts."""
    if not (isinstance(record, Pair) and isinstance(other, Pair)):
        return record
    if (record.preferred, record.tied) == (other.preferred, other.tied):
        return record
    return replace(record, preferred=None, tied=False)


def same_content(a: Record, b: Record) -> bool:
    """Return whether two records are the same but for their source, metadata and label."""
    match a, b:
        case Prompt(), Prompt():
            return (a.messages, a.rubric) == (b.messages, b.rubric)
        case Response(), Response():
            return a.text == b.text and same_content(a.prompt, b.prompt)
        case Pair(), Pair():
            texts = (a.first, a.second) == (b.first, b.second)
            return texts and same_content(a.prompt, b.prompt)
    return False


def describe(file: RecordFile, count: int, counts: Mapping[str, int] | None = None) -> str:
    """Return a line that says how a file of another project was read.

    Args:
        file: The file, after reading.
        count: Records of it.
        counts: Further numbers by what they count.
    """
    parts = [f"Read {file.path} as {file.description}: {count:,} records"]
    parts += [f"{number:,} {what}" for what, number in (counts or {}).items() if number]
    if labels := file.labels.total():
        people = f" by {len(file.labels):,} people" if len(file.labels) > 1 else ""
        parts.append(f"{labels:,} labels{people}")
    for names, what in ((file.metadata, "metadata"), (file.omissions, "left out")):
        if names:
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            parts.append(f"{what}: {', '.join(list(names)[:_FEW])}{more}")
    return "; ".join(parts) + "."
