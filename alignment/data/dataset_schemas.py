"""Schemas of data sets, by which rows of other projects become records.

The columns of a file determine its schema. A row without an id gets the hash of its content.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.data.messages import (
    begins_transcript,
    check_order,
    is_transcript,
    message_list,
    transcript,
    transcript_answer,
    transcript_prompt,
)
from alignment.data.source_rows import MalformedRow, Record, columns_of, read_rows
from alignment.records import Message, Pair, Prompt, Response, Side, Verdict
from megatron_ext.errors import UserError

Row = Mapping[str, Any]
# Columns that change the meaning of a conversation. A row is refused if its value would be lost.
_CONTEXT = (
    "system", "system_prompt", "system_message", "tools", "functions", "documents", "image",
    "images", "videos", "audio", "chat_template_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetSchema:
    """Columns of rows, and their conversion to records.

    Attributes:
        name: Description of the schema in error messages.
        columns: Columns that a row must have.
        convert: Function that converts a row to a record. Its second argument is the source of rows
            that name none.
        read_columns: All columns that `convert` reads where a row has them. None where `convert`
            refuses rows with other columns.
    """

    name: str
    columns: Collection[str]
    convert: Callable[[Row, str], Record]
    read_columns: Collection[str] | None = None

    def unread(self, row: Row) -> list[str]:
        """Return the columns of a row that have a value and are not read."""
        if self.read_columns is None:
            return []
        return [name for name in row if name not in self.read_columns and row[name] is not None]


def schema_of(columns: Collection[str], file: str | Path) -> DatasetSchema:
    """Return the first schema whose required columns are among those of a file.

    Args:
        columns: Columns of the file.
        file: Path of the file, for the error message.

    Raises:
        UserError: No schema matches.
    """
    for schema in SCHEMAS:
        if set(schema.columns) <= set(columns):
            return schema
    known = "; ".join(f"{', '.join(schema.columns)} ({schema.name})" for schema in SCHEMAS)
    raise UserError(
        f"{file} has the columns {', '.join(columns) or '(none)'}, which no known convention has; "
        f"known are: {known}"
    )


def read_records(
    path: str | Path,
    source: str = "",
    report_progress: Callable[[int], None] = lambda consumed: None,
    unread: Counter[str] | None = None,
) -> Iterator[Record | MalformedRow]:
    """Yield the records of a file of any known schema.

    Args:
        path: File to read.
        source: Source of rows that name none. Default: the file's name.
        report_progress: Function that is called now and then with the number of bytes read so far.
        unread: Counter to which the rows with a value in a column that is not read are added, by
            column.

    Yields:
        A record, or a `MalformedRow` for a row that cannot be converted.

    Raises:
        UserError: The file cannot be read, or its schema is unknown.
    """
    schema = schema_of(columns_of(path), path)
    source = source or Path(path).name.partition(".")[0]
    for number, row in read_rows(path, report_progress):
        if isinstance(row, MalformedRow):
            yield row
            continue
        try:
            if missing := [name for name in schema.columns if name not in row]:
                raise UserError(f"no {missing[0]!r}, which the rows before it have")
            record = schema.convert(row, source)
        except UserError as error:
            yield MalformedRow(number, str(error))
            continue
        if unread is not None:
            unread.update(schema.unread(row))
        yield record


def hash_id(*parts: object) -> str:
    """Return an id that depends on the parts only, for records without one."""
    return sha256(repr(parts).encode()).hexdigest()[:32]


def prompt_of(
    messages: Sequence[Message], source: str, id: object = None, rubric: str | None = None
) -> Prompt:
    """Return a prompt of messages that have been checked.

    Args:
        messages: Messages of the prompt.
        source: Source of the prompt.
        id: Id of the prompt. Default: a hash of the messages.
        rubric: Requirements that judges apply to the responses.
    """
    plain = [(message.role, message.content) for message in messages]
    return Prompt(str(id) if id is not None else hash_id(plain), messages, source, rubric)


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
    return Pair(name, prompt, first, second, preferred, source)


def _preference(row: Row, source: str) -> Pair:
    opening = _opening(row)
    chosen = _conversation(row, "chosen", opening)
    rejected = _conversation(row, "rejected", opening)
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected do not answer the same messages")
    _check_context(row, chosen[:-1])
    source = row.get("source") or source
    prompt = prompt_of(chosen[:-1], source, row.get("prompt_id"))
    texts = chosen[-1].content, rejected[-1].content
    return pair_of(prompt, *texts, source, row.get("id"), _is_tie(row))


def _opening(row: Row) -> list[Message] | None:
    """Return the messages of the column prompt, or None where a row has none."""
    prompt = row.get("prompt")
    if prompt in (None, "", []):
        return None
    if not isinstance(prompt, str):
        return message_list(prompt, "prompt")
    return transcript_prompt(prompt) if is_transcript(prompt) else [Message("user", prompt)]


def _conversation(row: Row, column: str, opening: Sequence[Message] | None) -> list[Message]:
    """Return the messages of a conversation that ends with the answer of a column.

    The messages before the answer are in the same column, in the column prompt, or in both.

    Args:
        row: Row of preferences.
        column: Column of the answer, chosen or rejected.
        opening: Messages of the column prompt; None where the row has none.

    Raises:
        UserError: There is no answer, nothing precedes it, or the two columns contradict each
            other.
    """
    value, prompt = row[column], row.get("prompt")
    plain = isinstance(prompt, str) and not is_transcript(prompt)
    if not isinstance(value, str):
        messages = message_list(value, column)
    elif opening is None or begins_transcript(value):
        messages = transcript(value)
    elif plain or not isinstance(prompt, str):
        messages = [Message("assistant", value)]
    else:
        messages = [transcript_answer(value, column)]
    if opening is not None and messages[: len(opening)] != opening:
        if messages[0].role == "assistant" and (len(messages) == 1 or not plain):
            messages = [*opening, *messages]
            check_order(messages, f"prompt with {column}")
        elif plain:
            _check_among(str(prompt), "prompt", messages[:-1])
        else:
            raise UserError(f"{column} does not begin with the messages of prompt")
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"{column} does not end with an answer of the assistant to something")
    return messages


def _check_context(row: Row, messages: Sequence[Message]) -> None:
    """Check that no column that belongs to the conversation is lost.

    Raises:
        UserError: The value of such a column is in no message.
    """
    for name in _CONTEXT:
        value = row.get(name)
        if isinstance(value, str) and value:
            _check_among(value, name, messages)
        elif value not in (None, "", [], {}):
            raise UserError(f"the column {name} is a part of the conversation and is not read")


def _check_among(text: str, column: str, messages: Sequence[Message]) -> None:
    if not any(text.strip() in message.content for message in messages):
        raise UserError(f"the text of the column {column} is in no message")


def _is_tie(row: Row) -> bool:
    """Return whether the label of a pair is a tie.

    Raises:
        UserError: A label has the wrong type, or the score of `chosen` is below that of `rejected`.
    """
    tie = row.get("tie")
    if tie not in (None, False, True):
        raise UserError("tie must be true or false")
    chosen, rejected = (row.get(name) for name in ("score_chosen", "score_rejected"))
    for score in (chosen, rejected):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (number and math.isfinite(score)):
            raise UserError("score_chosen and score_rejected must be finite numbers")
    if chosen is None or rejected is None:
        return bool(tie)
    if chosen < rejected:
        raise UserError("score_chosen is below score_rejected")
    return bool(tie) or chosen == rejected


def _messages_row(row: Row, source: str) -> Prompt | Response:
    """Return a prompt or, where the last message is the assistant's, a response."""
    messages = message_list(row["messages"], "messages")
    _check_context(row, messages)
    id, source = row.get("id"), row.get("source") or source
    if messages[-1].role == "system":
        raise UserError("messages has nothing of the user's")
    if messages[-1].role != "assistant":
        return prompt_of(messages, source, id, row.get("rubric"))
    if len(messages) == 1:
        raise UserError("messages has an answer of the assistant and nothing that it answers")
    prompt, text = prompt_of(messages[:-1], source, None, row.get("rubric")), messages[-1].content
    return Response(str(id) if id is not None else hash_id(prompt.id, text), prompt, text, source)


def _arena_hard(row: Row, source: str) -> Prompt:
    if not isinstance(row["prompt"], str):
        raise UserError(f"prompt must be text, not {str(row['prompt'])[:60]!r}")
    messages = [Message("user", row["prompt"])]
    return prompt_of(messages, f"arena-hard/{row['category']}", row["uid"])


SCHEMAS = (
    DatasetSchema("our verdicts", ("item", "outcome"), lambda row, _: Verdict.from_row(row)),
    DatasetSchema("our pairs", ("prompt", "first", "second"), lambda row, _: Pair.from_row(row)),
    DatasetSchema("our responses", ("prompt", "text"), lambda row, _: Response.from_row(row)),
    DatasetSchema(
        "preferences of Tulu 3 and UltraFeedback with lists of messages, of HH with transcripts, "
        "or as text or messages with a prompt",
        ("chosen", "rejected"),
        _preference,
        ("chosen", "rejected", "prompt", "prompt_id", "id", "source", "score_chosen",
         "score_rejected", "tie", *_CONTEXT),
    ),
    DatasetSchema(
        "questions of Arena-Hard",
        ("uid", "category", "subcategory", "prompt"),
        _arena_hard,
        ("uid", "category", "prompt"),
    ),
    DatasetSchema(
        "prompts, or conversations that end with an answer",
        ("messages",),
        _messages_row,
        ("messages", "id", "source", "rubric", *_CONTEXT),
    ),
)  # fmt: skip
