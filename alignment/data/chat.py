"""Conversations as token ids, by the chat template that comes with a tokenizer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from alignment.records import Message
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Example:
    """Token ids to train on. A loss on the completion alone is on the ids of `completion`.

    Attributes:
        prompt: all that the model is given, up to where its answer begins.
        completion: what it is to write, with the token that ends it.
    """

    prompt: list[int]
    completion: list[int]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], **template: Any) -> list[int]:
    """The ids of a conversation, up to where the assistant's next message begins.

    A special token's text inside a message stays text: no message can end itself or begin another.

    Args:
        tokenizer: of transformers.
        template: further variables of the template, as enable_thinking.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    encoder = _Encoder(tokenizer, messages)
    return encoder.ids(_render(tokenizer, encoder.hide(messages), True, template))


def example(tokenizer: Any, messages: Sequence[Message], answer: str, **template: Any) -> Example:
    """The ids of a conversation and of the assistant's answer to it, encoded apart, as they are
    when a model generates the answer.

    What a template writes after the token that ends the answer is left out. A template may mend an
    answer, for example the space around thinking: the completion is the answer as written by it.

    Raises:
        UserError: as for `prompt_ids`; or the template writes the conversation otherwise once it
            is answered.
    """
    answered = [*messages, Message("assistant", answer)]
    encoder = _Encoder(tokenizer, answered)
    asked = _render(tokenizer, encoder.hide(messages), True, template)
    whole = _render(tokenizer, encoder.hide(answered), False, template)
    if not whole.startswith(asked):
        raise UserError(
            "the chat template writes a conversation otherwise once it is answered, so that prompt "
            "and completion cannot be told apart: give the tokenizer another template"
        )
    rest = whole[len(asked) :]
    end = tokenizer.eos_token
    if end and end in rest:
        rest = rest[: rest.index(end) + len(end)]
    return Example(encoder.ids(asked), encoder.ids(rest))


def _render(
    tokenizer: Any, messages: Sequence[Message], open_answer: bool, template: dict[str, Any]
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: give one that has, or set its chat_template"
        )
    rows = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            rows, tokenize=False, add_generation_prompt=open_answer, **template
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {error}") from error


class _Encoder:
    """Encodes rendered text, and special tokens' texts that came from messages as plain text.

    While the template is rendered, each such text is replaced by one private character of its own.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Message]) -> None:
        self._tokenizer = tokenizer
        said = "".join(message.content for message in messages)
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special and token.content in said]
        free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in said)
        self._hidden = {token: next(free) for token in special}
        self._shown = {mark: token for token, mark in self._hidden.items()}

    def hide(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not self._hidden:
            return messages
        longest = sorted(self._hidden, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest)))
        return [
            Message(m.role, pattern.sub(lambda found: self._hidden[found[0]], m.content))
            for m in messages
        ]

    def ids(self, text: str) -> list[int]:
        """The ids of rendered text; the template has written what begins and ends a text."""
        marks = "".join(self._shown)
        pieces = re.split(f"([{marks}])", text) if marks else [text]
        ids: list[int] = []
        for piece in filter(None, pieces):
            plain = piece in self._shown
            ids += self._tokenizer(
                self._shown.get(piece, piece), add_special_tokens=False, split_special_tokens=plain
            )["input_ids"]
        return ids
