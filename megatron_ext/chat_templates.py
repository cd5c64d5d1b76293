"""Conversations as token ids, by the chat template that comes with a tokenizer.

Training, our server and the sampling of responses encode conversations here, so that they agree:

* A control token is a special token, or an added token that looks like markup: `<think>` and
  `<tool_call>` are added without being marked as special, and steer a model as `<|im_end|>` does.
  Added spaces and words ("\\n\\n", "covid-19") are text.
* What the template writes is parsed: its control tokens are tokens. In a message the name of a
  control token is text, so that no message can end itself, begin another or think for the model.
  One exception: the markers `<think>` and `</think>` around the thinking that begins a message of
  the assistant are the model's own, and are tokens. So is the first `</think>` alone where the
  template has opened the thinking. Further ones in the same message are text.
* Every message is in what is rendered, or the template is refused. Space may be trimmed, and the
  thinking of earlier messages left out.
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
"""A message: its role and content."""


def prompt_ids(
    tokenizer: Any,
    rows: Sequence[Row],
    variables: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> list[int]:
    """Return the ids of a conversation, up to where the assistant's next message begins.

    Args:
        tokenizer, rows, variables, chat_template: see `Conversation`.

    Raises:
        UserError: see `Conversation`; or the template leaves a message out.
    """
    conversation = Conversation(tokenizer, rows, variables, chat_template)
    conversation.check_kept()
    return conversation.ids(conversation.prompt)


class Conversation:
    """A conversation that is ready to be rendered and encoded.

    Attributes:
        rows: its messages, with marks in place of control tokens' names.
        prompt: what is rendered of them, up to where the assistant's next message begins.
        opened: whether the template itself opens the thinking of an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[Row],
        variables: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Render the messages up to where the assistant's next one begins.

        Args:
            tokenizer: one of transformers.
            rows: the messages.
            variables: of the template, such as enable_thinking.
            chat_template: instead of the tokenizer's own.

        Raises:
            UserError: there is no template, or it refuses the messages.
        """
        self._encoder = _encoder_of(tokenizer)
        self._tokenizer, self._variables = tokenizer, dict(variables or {})
        self._template = chat_template
        self._given, self.opened = list(rows), False
        self.rows = self._encoder.hide(rows, False)
        self.prompt = self._render(self.rows, True)
        if self.prompt.rstrip().endswith(THINK):
            self.opened = True
            self.rows = self._encoder.hide(rows, True)
            self.prompt = self._render(self.rows, True)

    def answered(self, answer: str) -> tuple[str, str]:
        """Render the conversation with the assistant's answer to it.

        Returns:
            the answer with marks, and what is rendered.

        Raises:
            UserError: the template refuses the messages.
        """
        row = {"role": "assistant", "content": answer}
        [hidden] = self._encoder.hide([row], self.opened)
        return hidden["content"], self._render([*self.rows, hidden], False)

    def ids(self, rendered: str) -> list[int]:
        """Encode rendered text; the template has written what begins and ends it."""
        return self._encoder.ids(rendered)

    def _render(self, rows: Sequence[Row], open_answer: bool) -> str:
        if not (self._template or self._tokenizer.chat_template):
            raise UserError(
                "the tokenizer has no chat template: give one that has, or set its chat_template"
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
            raise UserError(f"the chat template refuses the messages: {error}") from error

    def check_kept(self) -> None:
        """Check that each message is in the prompt, as often as it occurs.

        Raises:
            UserError: the template leaves one out.
        """
        self._check_roles()
        rendered = squeezed(self.prompt)
        contents = [_kept_part(row) for row in self.rows]
        for row, content in zip(self._given, contents):
            often = contents.count(content)
            if all(rendered.count(squeezed(text)) < often for text in _spellings(content)):
                raise _left_out(row)

    def _check_roles(self) -> None:
        """Check messages of these roles by contents that occur nowhere else, once a sequence."""
        roles = [row["role"] for row in self._given]
        key = repr((self._template or self._tokenizer.chat_template, roles, self._variables))
        if key in self._encoder.checked:
            return
        contents = [f"probe-{secrets.token_hex(8)}" for _ in roles]
        probes = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        try:
            rendered = self._render(probes, True)
        except UserError:  # a template may take contents of its own form alone
            return
        for row, content in zip(self._given, contents):
            if content not in rendered:
                raise _left_out(row)
        self._encoder.checked.add(key)


def _left_out(row: Row) -> UserError:
    return UserError(
        f"the chat template leaves out a message of the {row['role']} "
        f"({row['content'][:_SHOWN]!r}): give a template that keeps it with --chat-template, or "
        "leave such messages out of the data"
    )


def squeezed(text: str) -> str:
    """Return a text without its spaces, which templates trim."""
    return "".join(text.split())


def _kept_part(row: Row) -> str:
    """Return what a template must render; earlier thinking is not part of it."""
    content = row["content"]
    if row["role"] != "assistant":
        return content
    return content.partition(THOUGHT)[2] or content


def _spellings(content: str) -> list[str]:
    """Return a content and how JSON spells it, as some templates do with results of tools."""
    quoted = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return list(dict.fromkeys([content, *quoted]))


class _Encoder:
    """Encodes rendered text: control tokens of the template as such, their names in messages not.

    While a template is rendered, marks that nobody can guess stand for such names. Then the names
    take their place again, and marks stand for the template's control tokens, which a copy of the
    tokenizer knows by their marks alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {
            token.content: number
            for number, token in added.items()
            if token.special or not _WORD.fullmatch(token.content)
        }
        # Of private characters alone, so that no text of a message is found in a mark.
        key = "".join(chr(_PRIVATE + secrets.randbelow(6000)) for _ in range(8))
        self._marks = {name: key + _in_private(place) for place, name in enumerate(self._ids)}
        self._names = {mark: name for name, mark in self._marks.items()}
        self.checked: set[str] = set()
        longest = sorted(self._ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self._mark = re.compile(f"{key}[{chr(_PRIVATE)}-{chr(_PRIVATE + 9)}]+{_END}")
        # Where texts are normalized, another spelling may become a control token: "＜/think＞".
        self._always = tokenizer.split_special_tokens or (
            tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer is not None
            and any(token.normalized for token in added.values() if token.content in self._ids)
        )

    def hide(self, rows: Sequence[Row], opened: bool) -> list[Row]:
        """Put marks in the place of control tokens' names, but for the assistant's thinking."""
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
        return self._control.sub(lambda found: self._marks[found[0]], text)

    def ids(self, rendered: str) -> list[int]:
        if not self._always and not self._mark.search(rendered):
            return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if self._tokenizer.is_fast:
            return self._ids_by_copy(rendered)
        ids: list[int] = []
        end = 0
        for found in [*self._control.finditer(rendered), None]:
            text = rendered[end : found.start() if found else None]
            if text:
                ids += self._tokenizer(
                    self._shown(text), add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
            if found:
                ids.append(self._ids[found[0]])
                end = found.end()
        return ids

    def _shown(self, text: str) -> str:
        return self._mark.sub(lambda found: self._names[found[0]], text)

    def _ids_by_copy(self, rendered: str) -> list[int]:
        pieces, end = [], 0
        for found in self._control.finditer(rendered):
            pieces += [self._shown(rendered[end : found.start()]), self._marks[found[0]]]
            end = found.end()
        text = "".join([*pieces, self._shown(rendered[end:])])
        copy, ids_of = self._copy
        return [ids_of.get(i, i) for i in copy.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _copy(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer that knows control tokens by their marks, and their ids here."""
        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._marks.get(token["content"], token["content"])
        state["model"] = self._renamed(state["model"])
        state |= {"post_processor": None, "truncation": None, "padding": None}
        copy: Any = Tokenizer.from_str(json.dumps(state))
        ids = {copy.token_to_id(mark): self._ids[name] for name, mark in self._marks.items()}
        return copy, ids

    def _renamed(self, model: dict[str, Any]) -> dict[str, Any]:
        """A model's vocabulary in which no text can spell a control token."""
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
    """Return where an assistant's message has the markers of its thinking."""
    start = len(content) - len(content.lstrip())
    begins = content.startswith(THINK, start)
    end = content.find(THOUGHT, start)
    if end < 0 or not (begins or opened):
        return []
    marker = [(start, start + len(THINK))] if begins else []
    return [*marker, (end, end + len(THOUGHT))]


def _encoder_of(tokenizer: Any) -> _Encoder:
    """Return a tokenizer's encoder, made once for as long as no token is added to it."""
    size = len(tokenizer)
    known = getattr(tokenizer, "_chat_encoder", None)
    if known is None or known[0] != size:
        known = tokenizer._chat_encoder = (size, _Encoder(tokenizer))
    return known[1]
