r"""Encoding of conversations as token ids with the chat template of a tokenizer.

Training, the server and the sampling of responses encode conversations with this module, so that
their token ids agree:

* A control token is a special token, or an added token that looks like markup: `<think>` and
  `<tool_call>` are added without being marked as special, and control a model as `<|im_end|>` does.
  Added spaces and words ("\n\n", "covid-19") are text.
* Control tokens that the template writes are tokens. The name of a control token in a message is
  text, so that no message can end itself, begin another message or insert thinking of the model.
  There is one exception: the markers `<think>` and `</think>` around the thinking at the beginning
  of an assistant's message belong to the model and are tokens. The same holds for the first
  `</think>` if the template has opened the thinking. Further ones in the same message are text.
* A template that omits a message is refused. It may trim whitespace and omit the thinking of
  earlier messages.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_ext.errors import UserError

THINK, THOUGHT = "<think>", "</think>"
_WORD = re.compile(r"[\w\s.,'’-]+")
_PRIVATE, _END = 0xE000, "\uf8ff"  # the first and the last character of private use
_SHOWN = 40  # characters of a message in an error

Row = Mapping[str, str]
"""Message with role and content."""


def prompt_ids(
    tokenizer: Any,
    rows: Sequence[Row],
    variables: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> list[int]:
    """Return the ids of a conversation up to the beginning of the assistant's next message.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The messages.
        variables: Variables of the template, such as enable_thinking.
        chat_template: Template to use instead of the tokenizer's own.

    Raises:
        UserError: There is no template, or it rejects or omits a message.
    """
    conversation = Conversation(tokenizer, rows, variables, chat_template)
    conversation.check_complete()
    return conversation.ids(conversation.prompt)


def control_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Return the names of the control tokens of a tokenizer by id; see the top of this module."""
    return {number: name for name, number in _encoder_of(tokenizer).ids_by_name.items()}


class Conversation:
    """Conversation that is ready to be rendered and encoded.

    Attributes:
        rows: The messages, with marks in place of the names of control tokens.
        prompt: Rendered messages, up to the beginning of the assistant's next message.
        opened: Whether the template opens the thinking of a response.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[Row],
        variables: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Render the messages up to the beginning of the assistant's next message.

        Args:
            tokenizer: A tokenizer of transformers.
            rows: The messages.
            variables: Variables of the template, such as enable_thinking.
            chat_template: Template to use instead of the tokenizer's own.

        Raises:
            UserError: There is no template, or it rejects the messages.
        """
        self._encoder = _encoder_of(tokenizer)
        self._tokenizer, self._variables = tokenizer, dict(variables or {})
        self._template = chat_template
        self._messages, self.opened = list(rows), False
        self.rows = self._encoder.hide(rows, False)
        self.prompt = self._render(self.rows, True)
        if self.prompt.rstrip().endswith(THINK):
            self.opened = True
            self.rows = self._encoder.hide(rows, True)
            self.prompt = self._render(self.rows, True)

    def answered(self, answer: str) -> tuple[str, str]:
        """Render the conversation with the assistant's response.

        Args:
            answer: Text of the response.

        Returns:
            The response with marks, and the rendered conversation.

        Raises:
            UserError: The template rejects the messages.
        """
        row = {"role": "assistant", "content": answer}
        [hidden] = self._encoder.hide([row], self.opened)
        return hidden["content"], self._render([*self.rows, hidden], False)

    def ids(self, rendered: str) -> list[int]:
        """Encode rendered text without adding special tokens, which the template writes."""
        return self._encoder.ids(rendered)

    def _render(self, rows: Sequence[Row], open_answer: bool) -> str:
        if not (self._template or self._tokenizer.chat_template):
            raise UserError(
                "The tokenizer has no chat template. Use a tokenizer that has one, or set its "
                "chat_template."
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(rows),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=open_answer,
                **self._variables,
            )
        except Exception as error:  # a template may raise anything, to refuse a role for example
            raise UserError(f"The chat template refuses the messages: {error}") from error

    def check_complete(self) -> None:
        """Check that the prompt contains each message as often as the conversation does.

        Raises:
            UserError: The template omits a message.
        """
        self._check_roles()
        rendered = squeezed(self.prompt)
        contents = [_required_part(row) for row in self.rows]
        for row, content in zip(self._messages, contents):
            times = contents.count(content)
            if all(rendered.count(squeezed(text)) < times for text in _spellings(content)):
                raise _left_out(row)

    def _check_roles(self) -> None:
        """Check messages of these roles with unique contents, once for each sequence of roles."""
        roles = [row["role"] for row in self._messages]
        key = repr((self._template or self._tokenizer.chat_template, roles, self._variables))
        if key in self._encoder.checked:
            return
        contents = [f"probe-{secrets.token_hex(8)}" for _ in roles]
        probes = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        try:
            rendered = self._render(probes, True)
        except UserError:  # a template may accept only contents of a certain form
            return
        for row, content in zip(self._messages, contents):
            if content not in rendered:
                raise _left_out(row)
        self._encoder.checked.add(key)


def _left_out(row: Row) -> UserError:
    return UserError(
        f"The chat template omits a message of the {row['role']} "
        f"({row['content'][:_SHOWN]!r}). Use a template that includes it with --chat-template, or "
        "remove such messages from the data."
    )


def squeezed(text: str) -> str:
    """Return a text without whitespace, which templates may trim."""
    return "".join(text.split())


def _required_part(row: Row) -> str:
    """Return the part of a message that a template must render, which excludes its thinking."""
    content = row["content"]
    if row["role"] != "assistant":
        return content
    return content.partition(THOUGHT)[2] or content


def _spellings(content: str) -> list[str]:
    """Return a content and its JSON spellings, which some templates use for results of tools."""
    quoted = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys([content, *quoted]))


class _Encoder:
    """Encoder of rendered text that distinguishes control tokens from their names in messages.

    While a template is rendered, unguessable marks replace the names of control tokens in messages.
    Afterwards the names are restored, and marks replace the control tokens of the template. A copy
    of the tokenizer knows control tokens only by their marks.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.ids_by_name = {
            token.content: number
            for number, token in added.items()
            if token.special or not _WORD.fullmatch(token.content)
        }
        # The key consists of private characters, so that no text of a message occurs in a mark.
        key = "".join(chr(_PRIVATE + secrets.randbelow(6000)) for _ in range(8))
        self._marks = {
            name: key + _in_private(place) for place, name in enumerate(self.ids_by_name)
        }
        self._names = {mark: name for name, mark in self._marks.items()}
        self.checked: set[str] = set()
        longest = sorted(self.ids_by_name, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self._mark = re.compile(f"{key}[{chr(_PRIVATE)}-{chr(_PRIVATE + 9)}]+{_END}")
        # Normalization may turn another spelling into a control token: "＜/think＞".
        self._always = tokenizer.split_special_tokens or (
            tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer is not None
            and any(
                token.normalized for token in added.values() if token.content in self.ids_by_name
            )
        )

    def hide(self, rows: Sequence[Row], opened: bool) -> list[Row]:
        """Replace names of control tokens by marks, except around the assistant's thinking."""
        hidden: list[Row] = []
        for row in rows:
            content, pieces = row["content"], []
            end = 0
            for start, stop in _thinking(content, opened) if row["role"] == "assistant" else []:
                pieces += [self._hide(content[end:start]), content[start:stop]]
                end = stop
            hidden.append({**row, "content": "".join([*pieces, self._hide(content[end:])])})
        return hidden

    def _hide(self, text: str) -> str:
        return self._control.sub(lambda match: self._marks[match[0]], text)

    def ids(self, rendered: str) -> list[int]:
        """Encode rendered text."""
        if not self._always and not self._mark.search(rendered):
            return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if self._tokenizer.is_fast:
            return self._ids_by_copy(rendered)
        ids: list[int] = []
        end = 0
        for match in [*self._control.finditer(rendered), None]:
            text = rendered[end : match.start() if match else None]
            if text:
                ids += self._tokenizer(
                    self._shown(text), add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
            if match:
                ids.append(self.ids_by_name[match[0]])
                end = match.end()
        return ids

    def _shown(self, text: str) -> str:
        return self._mark.sub(lambda match: self._names[match[0]], text)

    def _ids_by_copy(self, rendered: str) -> list[int]:
        pieces, end = [], 0
        for match in self._control.finditer(rendered):
            pieces += [self._shown(rendered[end : match.start()]), self._marks[match[0]]]
            end = match.end()
        text = "".join([*pieces, self._shown(rendered[end:])])
        copy, ids_of = self._copy
        return [ids_of.get(i, i) for i in copy.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _copy(self) -> tuple[Any, dict[int, int]]:
        """Copy of the tokenizer that knows control tokens by their marks, and their ids."""
        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._marks.get(token["content"], token["content"])
        state["model"] = self._renamed(state["model"])
        state |= {"post_processor": None, "truncation": None, "padding": None}
        copy: Any = Tokenizer.from_str(json.dumps(state))
        ids = {copy.token_to_id(mark): self.ids_by_name[name] for name, mark in self._marks.items()}
        return copy, ids

    def _renamed(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return the tokenizer's model with a vocabulary in which no text is a control token."""
        vocab, merges = model.get("vocab"), model.get("merges")
        model = dict(model)
        if isinstance(vocab, dict):
            model["vocab"] = {self._marks.get(name, name): i for name, i in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[self._marks.get(name, name), score] for name, score in vocab]
        if merges:
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
            model["merges"] = [
                pair for pair in pairs if not {*pair, "".join(pair)} & self._marks.keys()
            ]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._marks.get(model["unk_token"], model["unk_token"])
        return model


def _in_private(number: int) -> str:
    return "".join(chr(_PRIVATE + int(digit)) for digit in str(number)) + _END


def _thinking(content: str, opened: bool) -> list[tuple[int, int]]:
    """Return the positions of the markers of the thinking in an assistant's message."""
    start = len(content) - len(content.lstrip())
    begins = content.startswith(THINK, start)
    end = content.find(THOUGHT, start)
    if end < 0 or not (begins or opened):
        return []
    marker = [(start, start + len(THINK))] if begins else []
    return [*marker, (end, end + len(THOUGHT))]


def _encoder_of(tokenizer: Any) -> _Encoder:
    """Return a tokenizer's encoder, cached as long as no token is added to the tokenizer."""
    size = len(tokenizer)
    encoder = getattr(tokenizer, "_chat_encoder", None)
    if encoder is None or encoder[0] != size:
        encoder = tokenizer._chat_encoder = (size, _Encoder(tokenizer))
    return encoder[1]
