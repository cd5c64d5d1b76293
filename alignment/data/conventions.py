"""Rows as others write them, as records.

A file's convention is told by its columns. Where a row has no id, its hash is one.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment.data.rows import Malformed, Record, columns_of, read_rows
from alignment.records import ROLES, Message, Pair, Prompt, Response, Side, Verdict
from megatron_ext.errors import UserError

Row = Mapping[str, Any]
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Convention:
    """How rows are written.

    Attributes:
        columns: that a row must have; others may be there.
        convert: makes a record of a row, and a source for rows that name none.
    """

    name: str
    columns: Collection[str]
    convert: Callable[[Row, str], Record]


def convention_of(columns: Collection[str], file: str | Path) -> Convention:
    """The convention that has these columns.

    Raises:
        UserError: none has.
    """
    for convention in CONVENTIONS:
        if set(convention.columns) <= set(columns):
            return convention
    known = "; ".join(f"{', '.join(c.columns)} ({c.name})" for c in CONVENTIONS)
    raise UserError(
        f"{file} has the columns {', '.join(columns) or '(none)'}, which no known convention has; "
        f"known are: {known}"
    )


def read_records(
    path: str | Path, source: str = "", told: Callable[[int], None] = lambda consumed: None
) -> Iterator[Record | Malformed]:
    """The records of a file of any convention; a row that gives none as `Malformed`.

    Args:
        source: for rows that name none; by default the file's name.
        told: see `read_rows`.

    Raises:
        UserError: the file cannot be read, or is of an unknown convention.
    """
    convention = convention_of(columns_of(path), path)
    source = source or Path(path).name.partition(".")[0]
    for number, row in read_rows(path, told):
        if isinstance(row, Malformed):
            yield row
            continue
        try:
            if missing := [name for name in convention.columns if name not in row]:
                raise UserError(f"no {missing[0]!r}, which the rows before it have")
            yield convention.convert(row, source)
        except UserError as error:
            yield Malformed(number, str(error))


def hash_id(*parts: object) -> str:
    """An id for what has none: the same for the same parts, in every file."""
    return sha256(repr(parts).encode()).hexdigest()[:32]


def prompt_of(
    messages: Sequence[Message], source: str, id: object = None, rubric: str | None = None
) -> Prompt:
    """A prompt of messages that have been checked."""
    plain = [(message.role, message.content) for message in messages]
    return Prompt(str(id) if id is not None else hash_id(plain), messages, source, rubric)


def pair_of(
    prompt: Prompt, chosen: str, rejected: str, source: str, id: object = None, equal: bool = False
) -> Pair:
    """A pair with its two sides in an order that tells nothing of which is better.

    Args:
        equal: whoever labelled them found neither better.
    """
    name = str(id) if id is not None else hash_id(prompt.id, chosen, rejected)
    # By the texts alone: the order neither follows the label nor depends on the id of the source.
    chosen_first = sha256(f"{prompt.id}\0{min(chosen, rejected)}".encode()).digest()[0] % 2 == 0
    if chosen > rejected:
        chosen_first = not chosen_first
    first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
    preferred = None if equal else Side.FIRST if chosen_first else Side.SECOND
    return Pair(name, prompt, first, second, preferred, source)


def transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Raises:
        UserError: it does not begin with a turn, or one speaker has two turns in a row.
    """
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        raise UserError(r"a transcript begins with \n\nHuman: or \n\nAssistant:")
    speakers, words = turns[::2], turns[1::2]
    for speaker, following in pairwise(speakers):
        if speaker == following:
            raise UserError(f"two turns of {speaker} in a row")
    return [Message(_ROLES[speaker], said.strip()) for speaker, said in zip(speakers, words)]


def _conversation(row: Row, column: str) -> list[Message]:
    """A column's messages, the last of them the assistant's."""
    value = row[column]
    if isinstance(value, str):
        # Plain answers to a prompt in a column of its own, or a transcript with it.
        if isinstance(row.get("prompt"), str):
            messages = [Message("user", row["prompt"]), Message("assistant", value)]
        else:
            messages = transcript(value)
    else:
        messages = _messages(value, column)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"{column} does not end with an answer of the assistant to something")
    return messages


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"{column} must be a list of messages, not {str(value)[:60]!r}")
    messages = []
    for message in value:
        known = message if isinstance(message, Mapping) else {}
        role, content = known.get("role"), known.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"a message of {column} has a role ({', '.join(ROLES)}) and text as content, not "
                f"{repr(message)[:60]}"
            )
        messages.append(Message(role, content))
    return messages


def _preference(row: Row, source: str) -> Pair:
    chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected do not answer the same messages")
    source = row.get("source") or source
    prompt = prompt_of(chosen[:-1], source, row.get("prompt_id"))
    scores = row.get("score_chosen"), row.get("score_rejected")
    equal = None not in scores and scores[0] == scores[1]
    texts = chosen[-1].content, rejected[-1].content
    return pair_of(prompt, *texts, source, row.get("id"), equal)


def _messages_row(row: Row, source: str) -> Prompt | Response:
    """A prompt; or, where the assistant has the last word, a response."""
    messages = _messages(row["messages"], "messages")
    id, source = row.get("id"), row.get("source") or source
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


CONVENTIONS = (
    Convention("our verdicts", ("item", "outcome"), lambda row, _: Verdict.from_row(row)),
    Convention("our pairs", ("prompt", "first", "second"), lambda row, _: Pair.from_row(row)),
    Convention("our responses", ("prompt", "text"), lambda row, _: Response.from_row(row)),
    Convention(
        "preferences of Tulu 3 and UltraFeedback with lists of messages, of HH with transcripts, "
        "or as text beside a prompt",
        ("chosen", "rejected"),
        _preference,
    ),
    Convention(
        "questions of Arena-Hard", ("uid", "category", "subcategory", "prompt"), _arena_hard
    ),
    Convention("prompts, or conversations that end with an answer", ("messages",), _messages_row),
)
