"""Records that flow between the commands of alignment, each a row of a JSONL or Parquet file.

Models answer prompts, judges judge responses and pairs of responses, and a verdict is what a judge
returned about one of them. A row is complete: a response carries its prompt, so that files can be
split, joined and shuffled without a second file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from megatron_ext.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


class Outcome(StrEnum):
    """Outcome of a question to a judge; the last two carry no judgment and are never a score."""

    SCORE = "score"
    PREFERENCE = "preference"
    TIE = "tie"
    UNPARSEABLE = "unparseable"  # the judge answered, but not in its format
    FAILED = "failed"  # there is no answer: it was refused, timed out or cut off


class Side(StrEnum):
    """Side of a pair, in the order of the pair, whichever response was shown first."""

    FIRST = "first"
    SECOND = "second"

    @property
    def other(self) -> "Side":
        """Return the other side."""
        return Side.SECOND if self is Side.FIRST else Side.FIRST


@dataclass(frozen=True)
class Message:
    """Message of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: The text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class _Record:
    """Row with a fixed set of fields."""

    def to_row(self) -> dict[str, Any]:
        """Return the row as plain values, without metadata or a tie that it does not have."""
        return _without_absent(asdict(self))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the record of a row.

        Args:
            row: The row as plain values.

        Raises:
            UserError: If a field is missing, unknown or of a wrong type. The reader of the file
                adds its name and the line.
        """
        names = {one.name for one in fields(cls)}
        if unknown := sorted(set(row) - names):
            raise UserError(
                f"unknown field {unknown[0]!r}; the fields of a {cls.__name__} are {sorted(names)}"
            )
        try:
            return cls(**row)
        except TypeError as error:
            raise UserError(f"not a {cls.__name__}: {str(error).rpartition(') ')[2]}") from None


@dataclass(frozen=True)
class Prompt(_Record):
    """Prompt of a model.

    Attributes:
        id: Name that is unique in all files of a study; a hash of the messages if the source has
            no names.
        messages: The conversation, whose last message is from the user or a tool.
        source: Origin of the prompt, for counts and slices.
        rubric: Description of a good answer, for judges whose template shows it.
        metadata: Further columns of the source by name, such as a reference answer, for functions,
            verifiers and templates of judges. In a row they may also be one JSON text. A column
            without a value is left out.
    """

    id: str
    messages: Sequence[Message]
    source: str = ""
    rubric: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_text(self, "id", "source")
        object.__setattr__(self, "metadata", _metadata(self.metadata))
        object.__setattr__(self, "messages", _messages(self.messages))
        if self.messages[-1].role == "assistant":
            raise UserError(f"prompt {self.id!r} ends with the assistant's message")


@dataclass(frozen=True)
class Response(_Record):
    """Response to a prompt, which a pointwise judge scores.

    Attributes:
        id: Name that is unique in the file.
        prompt: The prompt.
        text: The generated text, without the tokens that end it.
        source: The model, or the step of the policy, that generated it.
    """

    id: str
    prompt: Prompt
    text: str
    source: str = ""

    def __post_init__(self) -> None:
        _check_text(self, "id", "text", "source")
        object.__setattr__(self, "prompt", _prompt(self.prompt))


@dataclass(frozen=True)
class Pair(_Record):
    """Pair of responses to one prompt, which a pairwise judge compares.

    Attributes:
        id: Name that is unique in the file.
        prompt: The prompt.
        first: The text of the first response.
        second: The text of the second response.
        preferred: The side that the author of the data prefers; None without a label, with those of
            several people, or for a tie.
        source: Origin of the data.
        tied: Whether the author of the data holds both responses for equally good.
    """

    id: str
    prompt: Prompt
    first: str
    second: str
    preferred: Side | None = None
    source: str = ""
    tied: bool = False

    def __post_init__(self) -> None:
        _check_text(self, "id", "first", "second", "source")
        object.__setattr__(self, "prompt", _prompt(self.prompt))
        if self.preferred is not None:
            object.__setattr__(self, "preferred", _member(Side, "preferred", self.preferred))
        object.__setattr__(self, "tied", bool(self.tied))
        if self.tied and self.preferred is not None:
            raise UserError("a pair that is tied has no preferred side")


@dataclass(frozen=True)
class Verdict(_Record):
    """Verdict of a judge on an item.

    Attributes:
        item: The id of the response or pair.
        outcome: The outcome, which decides which of the other fields is set.
        score: The score of a response; an expectation over labels may lie between integers.
        preferred: The preferred side of a pair.
        swapped: Whether the second response of the pair was shown first.
        sample: Number of this answer among several to the same question, from 0.
        reason: Why there is no judgment, in a sentence.
        thinking: The thinking before the label; empty if the judge does not think.
        answer: The whole answer of the judge.
        judge: A hash of everything that the verdict depends on: model, prompt template, sampling
            and parser.
    """

    item: str
    outcome: Outcome
    score: float | None = None
    preferred: Side | None = None
    swapped: bool = False
    sample: int = 0
    reason: str = ""
    thinking: str = ""
    answer: str = ""
    judge: str = ""

    def __post_init__(self) -> None:
        _check_text(self, "item", "reason", "thinking", "answer", "judge")
        object.__setattr__(self, "outcome", _member(Outcome, "outcome", self.outcome))
        if self.preferred is not None:
            object.__setattr__(self, "preferred", _member(Side, "preferred", self.preferred))
        if not isinstance(self.swapped, bool):
            raise UserError(f"swapped must be true or false, not {self.swapped!r}")
        if type(self.sample) is not int or self.sample < 0:
            raise UserError(f"sample must be a whole number from 0, not {self.sample!r}")
        number = isinstance(self.score, int | float) and not isinstance(self.score, bool)
        if self.score is not None and not (number and math.isfinite(self.score)):
            raise UserError(f"score must be a finite number, not {self.score!r}")
        for name, outcome in (("score", Outcome.SCORE), ("preferred", Outcome.PREFERENCE)):
            if (getattr(self, name) is not None) != (self.outcome is outcome):
                raise UserError(
                    f"a verdict must have a {name} if and only if its outcome is {outcome}"
                )
        judged = self.outcome in (Outcome.SCORE, Outcome.PREFERENCE, Outcome.TIE)
        if judged == bool(self.reason):
            raise UserError("a verdict must have a reason if and only if it has no judgment")

    @property
    def judged(self) -> bool:
        """Return whether the verdict holds a judgment."""
        return not self.reason


def _check_text(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str):
            raise UserError(f"{name} must be text, not {value!r}")
    if not getattr(record, names[0]):
        raise UserError(f"{names[0]} is empty")


def _without_absent(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("metadata", "tied"):
        if name in row and not row[name]:
            del row[name]
    if isinstance(row.get("prompt"), dict):
        row["prompt"] = _without_absent(row["prompt"])
    return row


def _metadata(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"metadata must be a mapping from names to values, not {value!r:.60}")
    return {name: content for name, content in value.items() if content is not None}


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"messages must be a list of at least one message, not {value!r}")
    return tuple(message_of(message) for message in value)


def message_of(value: Any) -> Message:
    """Return the message that a row describes.

    Args:
        value: The message as plain values.

    Raises:
        UserError: If there is no role or no text, or there is a further field with a value. Such a
            field (tool_calls, reasoning_content, weight) changes what the message means, so that
            the message cannot be stored without it.
    """
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"a message must be a mapping with role and content, not {value!r:.60}")
    for name, content in value.items():
        if name not in ("role", "content") and content not in (None, "", [], {}):
            raise UserError(f"a message has {name!r}, which cannot be stored")
    if not {"role", "content"} <= set(value):
        raise UserError(f"a message must have role and content, not {', '.join(map(str, value))}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise UserError(f"a message's role is one of {', '.join(ROLES)}, not {role!r}")
    if not isinstance(content, str):
        kinds = {type(None): "null", list: "a list of parts"}
        kind = kinds.get(type(content), type(content).__name__)
        raise UserError(f"a message's content must be text, not {kind}")
    return Message(role, content)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, Prompt):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"prompt must be a mapping with the fields of a prompt, not {value!r}")
    return Prompt.from_row(value)


def _member[E: StrEnum](kind: type[E], name: str, value: Any) -> E:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name} is one of {', '.join(kind)}, not {value!r}") from None
