"""Conversations and answers as token ids to train on, by the tokenizer's chat template.

What training relies on of a template and its tokenizer is checked here, on every row before the
first step, and at the start of a command by `check_template`:

* The prompt is a prefix of the conversation with its answer, so that the two can be told apart.
* The template ends an answer with an end token of the model: one that is not taught to stop, or
  stops where nobody looks for it, runs to the limit.
* The answer is written as it is, its thinking included. Space may be trimmed.
* `megatron_ext.chat_templates` lists what holds for every message: none is left out, and none can
  hold a control token.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.records import Message
from megatron_ext import chat_templates as chat
from megatron_ext.chat_templates import THINK, Conversation, squeezed
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens

_SHOWN = 40  # characters of an answer in an error
_PROBE = "Yes."  # an answer to see how the template ends one


@dataclass(frozen=True)
class ChatExample:
    """Token ids to train on. A loss on the completion alone is on the ids of `completion`.

    Attributes:
        prompt: all that the model is given, up to where its answer begins.
        completion: what it is to write, with the token that ends it.
    """

    prompt: list[int]
    completion: list[int]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], **template: Any) -> list[int]:
    """Return the ids of a conversation, up to where the assistant's next message begins.

    Args:
        tokenizer: one of transformers.
        messages: the conversation.
        template: further variables of the template, such as enable_thinking.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages or
            leaves one of them out.
    """
    return chat.prompt_ids(tokenizer, _rows(messages), template)


def example(
    tokenizer: Any, messages: Sequence[Message], answer: str, **template: Any
) -> ChatExample:
    """Return the ids of a conversation and of the assistant's answer to it.

    They are encoded apart, as they are when a model generates the answer. What a template writes
    after the token that ends the answer is left out.

    Raises:
        UserError: see `prompt_ids`; or the template does not keep what the head of this page
            promises of an answer.
    """
    conversation = Conversation(tokenizer, _rows(messages), template)
    hidden, whole = conversation.answered(answer)
    if not whole.startswith(conversation.prompt):
        raise UserError(
            "The chat template writes a conversation differently after it is answered, so that "
            "prompt and completion cannot be separated. Choose another template with "
            "--chat-template."
        )
    conversation.check_complete()
    completion = _ended(tokenizer, whole[len(conversation.prompt) :], hidden)
    written = (THINK if conversation.opened else "") + completion
    if squeezed(hidden) not in squeezed(written):
        raise UserError(_lost(conversation, answer))
    return ChatExample(conversation.ids(conversation.prompt), conversation.ids(completion))


def decode_ids(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens as it is: control tokens by name, spaces not cleaned up."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_template(tokenizer: Any, messages: Sequence[Message], **template: Any) -> str | None:
    """Check that the template ends an answer with an end token of the model.

    Unlike `example`, this does not need the prompt to be a prefix: a model that samples its own
    answers is not trained on the template's writing of them.

    Args:
        tokenizer: see `prompt_ids`.
        messages: a conversation that the model is to answer.
        template: see `prompt_ids`.

    Returns:
        A warning, if the end token is one that the tokenizer itself does not name.

    Raises:
        UserError: it ends otherwise, leaves a message out or refuses the messages.
    """
    conversation = Conversation(tokenizer, _rows(messages), template)
    conversation.check_complete()
    hidden, whole = conversation.answered(_PROBE)
    place = whole.rfind(hidden)
    if place < 0:
        raise UserError(_lost(conversation, _PROBE))
    ended = _ended(tokenizer, whole[place + len(hidden) :])
    [last] = conversation.ids(ended)[-1:]
    if last == tokenizer.eos_token_id:
        return None
    return (
        f"the chat template ends an answer with {tokenizer.convert_ids_to_tokens(last)!r}, which "
        "generation_config.json names as an end token, and the tokenizer does not: it names "
        f"{tokenizer.eos_token!r}, and a program that reads the tokenizer alone will not stop there"
    )


def warn_of_template(
    command: str,
    tokenizer: Any,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    trains: bool = True,
) -> None:
    """Check a command's template, and print a warning on the first rank where there is one.

    Args:
        command: its name.
        tokenizer, messages, template: see `check_template`.
        trains: whether it trains; one that only generates warns of what training refuses.

    Raises:
        UserError: see `check_template`.
    """
    try:
        warning = check_template(tokenizer, messages, **template)
    except UserError as error:
        if trains:
            raise
        warning = str(error)
    if warning and os.environ.get("RANK", "0") == "0":
        print(f"{command}: warning: {warning}", file=sys.stderr, flush=True)


def _rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _ended(tokenizer: Any, rendered: str, answer: str = "") -> str:
    """Return an answer up to and with its end token.

    Args:
        tokenizer: see `prompt_ids`.
        rendered: what a template writes of the answer and after it.
        answer: to leave out of the message.

    Raises:
        UserError: it has none.
    """
    names = [tokenizer.convert_ids_to_tokens(end) for end in sorted(end_tokens(tokenizer))]
    names = sorted(filter(None, names), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)) or "(?!)", rendered)
    if found is None:
        ending = rendered.rpartition(answer.strip())[2][-_SHOWN:] if answer else rendered
        raise UserError(
            f"the chat template ends an answer with {ending!r} and not with an "
            f"end token of the model ({', '.join(names) or 'it has none'}), so that a trained "
            "model would not stop: add the token to eos_token_id in generation_config.json, or "
            "give another template with --chat-template"
        )
    return rendered[: found.end()]


def _lost(conversation: Conversation, answer: str) -> str:
    lost = "the thinking of an answer" if THINK in answer else "a part of an answer"
    return (
        f"the chat template leaves out {lost} ({answer.strip()[:_SHOWN]!r}), which then cannot be "
        "learned: give a template that keeps it with --chat-template"
    )
