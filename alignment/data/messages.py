"""Parsers of conversations in the formats of other projects: transcripts and lists of messages.

A conversation is read completely or refused. No message, field or turn is dropped.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alignment.records import Message, message_of
from megatron_ext.errors import UserError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Return whether a text has a turn of a transcript, at its beginning or further on."""
    return bool(_TURN.search(text))


def begins_transcript(text: str) -> bool:
    """Return whether a text begins with a turn of a transcript."""
    return bool(_TURN.match(text))


def transcript(text: str) -> list[Message]:
    r"""Return the turns of "\n\nHuman: ...\n\nAssistant: ..." without the blanks around them.

    Raises:
        UserError: The text does not begin with a turn, or one speaker has two turns in a row.
    """
    before, *turns = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        raise UserError(r"a transcript begins with \n\nHuman: or \n\nAssistant:")
    speakers, words = turns[::2], turns[1::2]
    for speaker, following in pairwise(speakers):
        if speaker == following:
            raise UserError(f"two turns of {speaker} in a row")
    return [Message(_ROLES[speaker], content.strip()) for speaker, content in zip(speakers, words)]


def transcript_prompt(text: str) -> list[Message]:
    """Return the turns of a transcript that ends where the assistant's answer begins.

    Raises:
        UserError: The text is no transcript, or ends inside of the assistant's answer.
    """
    messages = transcript(text)
    if messages[-1].role == "assistant":
        if messages[-1].content:
            raise UserError("prompt is a transcript that ends with a part of the answer")
        messages.pop()
    if not messages:
        raise UserError("prompt is a transcript without a turn")
    return messages


def transcript_answer(text: str, column: str) -> Message:
    """Return the answer to a transcript, without the blanks around it.

    Raises:
        UserError: The text has further turns.
    """
    if _TURN.search(text):
        raise UserError(f"{column} has further turns after the answer")
    return Message("assistant", text.strip())


def message_list(value: Any, column: str) -> list[Message]:
    """Return the messages of a column.

    Args:
        value: A list of mappings with role and content. Parquet files also have mappings of lists,
            one list for all roles and one for all contents.
        column: Name of the column, for error messages.

    Raises:
        UserError: The value is something else, a message cannot be read completely, or the messages
            are in an impossible order.
    """
    if isinstance(value, Mapping):
        value = _from_lists(value, column)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"{column} must be a list of messages, not {_kind(value)}")
    try:
        messages = [message_of(message) for message in value]
    except UserError as error:
        raise UserError(f"{column}: {error}") from None
    check_order(messages, column)
    return messages


def check_order(messages: Sequence[Message], column: str) -> None:
    """Check that a system message comes first and that the assistant has no two turns in a row.

    Raises:
        UserError: The order is another one.
    """
    if any(message.role == "system" for message in messages[1:]):
        raise UserError(f"{column} has a system message after its first message")
    for message, following in pairwise(messages):
        if message.role == following.role == "assistant":
            raise UserError(f"{column} has two messages of the assistant in a row")


def _from_lists(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    lists = {name: items for name, items in value.items() if items is not None}
    if not lists or not all(isinstance(items, list) for items in lists.values()):
        raise UserError(f"{column} must be a list of messages, not a single mapping")
    if len({len(items) for items in lists.values()}) > 1:
        raise UserError(f"{column} has lists of different lengths: {', '.join(lists)}")
    return [dict(zip(lists, items)) for items in zip(*lists.values())]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    return "an empty list" if value == [] else type(value).__name__
