"""Conversion of conversations and answers to token ids, by the tokenizer's chat template.

Training relies on the following properties of a template and its tokenizer. They are checked on
every row before the first step, and at the start of a command by `check_template`:

* The prompt is a prefix of the conversation with its answer, so that the two can be separated.
* The template ends an answer with an end token of the model. A model that is not trained to emit
  this token, or emits one at which generation does not stop, generates up to the length limit.
* The template keeps the whole answer, including its thinking. White space may be trimmed.
* `megatron_ext.chat_templates` lists the requirements on every message: the template omits none,
  and no message can contain a control token.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.records import Message
from megatron_ext import chat_templates as chat
from megatron_ext.chat_templates import THINK, Conversation, squeezed
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens

_SHOWN = 40  # characters of an answer in an error message
_PROBE = "Yes."  # answer that shows how the template ends one


@dataclass(frozen=True)
class ChatExample:
    """Token ids of a training example.

    Attributes:
        prompt: Ids of the input of the model, up to the beginning of its answer.
        completion: Ids of the answer, with its end token. A loss on the completion alone covers
            exactly these.
    """

    prompt: list[int]
    completion: list[int]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], **template: Any) -> list[int]:
    """Return the ids of a conversation, up to the beginning of the assistant's next message.

    Args:
        tokenizer: Tokenizer of transformers.
        messages: Messages of the conversation.
        template: Further variables of the template, such as `enable_thinking`.

    Raises:
        UserError: The tokenizer has no chat template, or its template refuses the messages or
            omits one of them.
    """
    return chat.prompt_ids(tokenizer, _rows(messages), template)


def example(
    tokenizer: Any, messages: Sequence[Message], answer: str, **template: Any
) -> ChatExample:
    """Return the ids of a conversation and of the assistant's answer to it.

    Both are encoded separately, as they are when a model generates the answer. Text of the template
    after the end token of the answer is omitted.

    Args:
        tokenizer: Tokenizer of transformers.
        messages: Messages of the conversation.
        answer: Text of the answer.
        template: Further variables of the template, such as `enable_thinking`.

    Raises:
        UserError: The tokenizer has no chat template, or its template lacks one of the properties
            at the top of this module.
    """
    conversation = Conversation(tokenizer, _rows(messages), template)
    hidden, rendered = conversation.answered(answer)
    if not rendered.startswith(conversation.prompt):
        raise UserError(
            "The chat template writes a conversation differently after it is answered, so that "
            "prompt and completion cannot be separated. Choose another template with "
            "--chat-template."
        )
    conversation.check_complete()
    completion = _ended(tokenizer, rendered[len(conversation.prompt) :], hidden)
    written = (THINK if conversation.opened else "") + completion
    if squeezed(hidden) not in squeezed(written):
        raise UserError(_lost(answer))
    return ChatExample(conversation.ids(conversation.prompt), conversation.ids(completion))


def decode_ids(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens unchanged: with control tokens by name and without clean-up."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_template(tokenizer: Any, messages: Sequence[Message], **template: Any) -> str | None:
    """Check that the template ends an answer with an end token of the model.

    Unlike `example`, this does not require the prompt to be a prefix: a model that samples its own
    answers is not trained on the form in which the template writes them.

    Args:
        tokenizer: Tokenizer of transformers.
        messages: Messages of a conversation that the model should answer.
        template: Further variables of the template, such as `enable_thinking`.

    Returns:
        A warning if the tokenizer itself does not name the end token; otherwise None.

    Raises:
        UserError: The template ends an answer differently, omits a message or refuses the messages.
    """
    conversation = Conversation(tokenizer, _rows(messages), template)
    conversation.check_complete()
    hidden, rendered = conversation.answered(_PROBE)
    position = rendered.rfind(hidden)
    if position < 0:
        raise UserError(_lost(_PROBE))
    ending = _ended(tokenizer, rendered[position + len(hidden) :])
    [last] = conversation.ids(ending)[-1:]
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
    """Check the template of a command, and print its warning, if any, on the first rank.

    Args:
        command: Name of the command.
        tokenizer: Tokenizer of transformers.
        messages: Messages of a conversation that the model should answer.
        template: Further variables of the template, such as `enable_thinking`.
        trains: Whether the command trains. A command that only generates prints a warning where
            training refuses the template.

    Raises:
        UserError: `check_template` refuses the template of a command that trains.
    """
    try:
        warning = check_template(tokenizer, messages, **template)
    except UserError as error:
        if trains:
            raise
        warning = str(error)
    if warning and os.environ.get("RANK", "0") == "0":
        console.warn(f"{command}: warning: {warning}")


def _rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _ended(tokenizer: Any, rendered: str, answer: str = "") -> str:
    """Return a rendered answer up to and including its end token.

    Args:
        tokenizer: Tokenizer of transformers.
        rendered: Output of the template from the beginning of the answer on, or after its text.
        answer: Text of the answer, to omit from the error message.

    Raises:
        UserError: The output contains no end token.
    """
    names = [tokenizer.convert_ids_to_tokens(end) for end in sorted(end_tokens(tokenizer))]
    names = sorted(filter(None, names), key=len, reverse=True)
    end_token = re.search("|".join(map(re.escape, names)) or "(?!)", rendered)
    if end_token is None:
        ending = rendered.rpartition(answer.strip())[2][-_SHOWN:] if answer else rendered
        raise UserError(
            f"The chat template ends an answer with {ending!r} and not with an "
            f"end token of the model ({', '.join(names) or 'it has none'}), so that a trained "
            "model would not stop. Add the token to eos_token_id in generation_config.json, or "
            "give another template with --chat-template."
        )
    return rendered[: end_token.end()]


def _lost(answer: str) -> str:
    """Return the error message about a template that omits a part of an answer."""
    part = "the thinking of an answer" if THINK in answer else "a part of an answer"
    return (
        f"the chat template leaves out {part} ({answer.strip()[:_SHOWN]!r}), which then cannot be "
        "learned: give a template that keeps it with --chat-template"
    )
