"""Parsers of conversations in the formats of other projects: transcripts and lists of messages.

A conversation is read completely or refused. No message, turn or field that changes the meaning of
a message is dropped.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alignment.records import Message, message_of
from megatron_ext.errors import UserError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Roles of other projects: ShareGPT, Gemini, Llama and newer models of OpenAI.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "developer": "system", "function": "tool", "observation": "tool",
    "function_response": "tool", "ipython": "tool",
}  # fmt: skip
# Fields of a message that change what it means or how it is trained on.
_MEANINGFUL = {
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio",
    "images", "image", "videos", "weight", "loss", "train", "trainable", "masked",
}  # fmt: skip


def is_transcript(text: str) -> bool:
    """Return whether a text has a turn of a transcript, at its beginning or further on."""
    return bool(_TURN.search(text))


def begins_transcript(text: str) -> bool:
    """Return whether a text begins with a turn of a transcript."""
    return bool(_TURN.match(text))


def transcript(text: str) -> list[Message]:
    r"""Return the turns of "\n\nHuman: ...\n\nAssistant: ..." without surrounding white space.

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
    return [
        Message(_SPEAKERS[speaker], content.strip()) for speaker, content in zip(speakers, words)
    ]


def transcript_prompt(text: str) -> list[Message]:
    """Return the turns of a transcript that ends where the assistant's answer begins.

    Raises:
        UserError: The text is not a transcript, or ends within the assistant's answer.
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
    """Return the answer to a transcript, without surrounding white space.

    Raises:
        UserError: The text has further turns.
    """
    if _TURN.search(text):
        raise UserError(f"{column} has further turns after the answer")
    return Message("assistant", text.strip())


def is_json_messages(text: str) -> bool:
    """Return whether a text is a list of messages in JSON, as a cell of a CSV file may be."""
    if not text.lstrip().startswith("[") or not ('"role"' in text or '"from"' in text):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and ({"role", "content"} <= set(message) or {"from", "value"} <= set(message))
        for message in value
    )


def message_list(value: Any, column: str, omissions: list[str] | None = None) -> list[Message]:
    """Return the messages of a column.

    Args:
        value: A list of mappings with role and content (OpenAI) or from and value (ShareGPT), or
            one such mapping, also as JSON text. Parquet files also have mappings of lists, one list
            for all roles and one for all contents.
        column: Name of the column, for error messages.
        omissions: List to which the names of fields that are left out are added.

    Raises:
        UserError: The value is something else, a message cannot be read completely, or the messages
            are in an impossible order.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{column} begins like a list, but is not JSON: {error}") from None
    if isinstance(value, Mapping):
        value = _from_lists(value, column)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"{column} must be a list of messages, not {_kind(value)}")
    try:
        messages = [_message(message, column, omissions) for message in value]
    except UserError as error:
        raise UserError(f"{column}: {error}") from None
    check_order(messages, column)
    return messages


def _message(value: Any, column: str, omissions: list[str] | None) -> Message:
    """Return a message of another project with the keys and roles of this one."""
    if not isinstance(value, Mapping):
        return message_of(value)
    message = {name: entry for name, entry in value.items() if entry not in (None, "", [], {})}
    if "from" in message and "role" not in message:
        message = {"content": value.get("value"), **message, "role": message["from"]}
        message = {name: entry for name, entry in message.items() if name not in ("from", "value")}
    else:
        message = {**{n: value[n] for n in ("role", "content") if n in value}, **message}
    for name in sorted(message.keys() - {"role", "content"} - _MEANINGFUL):
        del message[name]
        if omissions is not None:
            omissions.append(f"{column}.{name}")
    role = message.get("role")
    message["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    content = message.get("content")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        message["content"] = "".join(part["text"] for part in content)
    return message_of(message)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") in ("text", "input_text", "output_text")
        and isinstance(part.get("text"), str)
    )


def check_order(messages: Sequence[Message], column: str) -> None:
    """Check that a system message comes first and that no two turns of the assistant are in a row.

    Raises:
        UserError: The order is different.
    """
    if any(message.role == "system" for message in messages[1:]):
        raise UserError(f"{column} has a system message after its first message")
    for message, following in pairwise(messages):
        if message.role == following.role == "assistant":
            raise UserError(f"{column} has two messages of the assistant in a row")


def _from_lists(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Return the messages of a mapping: of its lists, or the one message that it is."""
    lists = {name: items for name, items in value.items() if items is not None}
    if isinstance(value.get("role", value.get("from")), str):
        return [dict(value)]
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
