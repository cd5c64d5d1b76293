"""What flows between the tools of alignment, each a row of a JSONL or Parquet file.

Prompts are asked, responses and pairs of responses are judged, and verdicts are what a judge said
of one of them. A row stands for itself: a response carries its prompt, so that files can be split,
joined and shuffled without another file beside them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

from megatron_ext.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


class Outcome(StrEnum):
    """How asking a judge ended. The last two carry no judgement: they are never a score of 0."""

    SCORE = "score"
    PREFERENCE = "preference"
    TIE = "tie"
    UNPARSEABLE = "unparseable"  # the judge answered, and not in the form asked for
    FAILED = "failed"  # there is no answer: refused, timed out, cut off


class Side(StrEnum):
    """One response of a pair, in the pair's own order, whichever was shown first."""

    FIRST = "first"
    SECOND = "second"

    @property
    def other(self) -> "Side":
        return Side.SECOND if self is Side.FIRST else Side.FIRST


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class _Record:
    """A row with a fixed set of fields."""

    def to_row(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The record of a file's row.

        Raises:
            UserError: a field is missing, unknown, or of a wrong kind; the message does not name
                the file and line, which the reader adds.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(row) - known):
            raise UserError(f"unknown field {unknown[0]!r}; a {cls.__name__} has {sorted(known)}")
        try:
            return cls(**row)
        except TypeError as error:
            raise UserError(f"not a {cls.__name__}: {str(error).rpartition(') ')[2]}") from None


@dataclass(frozen=True)
class Prompt(_Record):
    """What a model is asked.

    Attributes:
        id: unique over all files of a study; a hash of the messages where the source has none.
        messages: at least one, the last of them the user's (or a tool's).
        source: where it is from, for counts and slices.
        rubric: what a good answer has, for judges that are shown one.
    """

    id: str
    messages: Sequence[Message]
    source: str = ""
    rubric: str | None = None

    def __post_init__(self) -> None:
        _check_text(self, "id", "source")
        object.__setattr__(self, "messages", _messages(self.messages))
        if self.messages[-1].role == "assistant":
            raise UserError(f"prompt {self.id!r} ends with the assistant's message")


@dataclass(frozen=True)
class Response(_Record):
    """One answer to a prompt: the item of a pointwise judge.

    Attributes:
        text: as generated, without the tokens that end it.
        source: the model, or the step of the policy, that wrote it.
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
    """Two answers to one prompt: the item of a pairwise judge.

    Attributes:
        first, second: the texts.
        preferred: by whoever labelled the data; none where nobody has, or found them equal.
        source: of the data.
    """

    id: str
    prompt: Prompt
    first: str
    second: str
    preferred: Side | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _check_text(self, "id", "first", "second", "source")
        object.__setattr__(self, "prompt", _prompt(self.prompt))
        if self.preferred is not None:
            object.__setattr__(self, "preferred", _member(Side, "preferred", self.preferred))


@dataclass(frozen=True)
class Verdict(_Record):
    """What a judge said of an item, once.

    Attributes:
        item: the id of the response or pair.
        outcome: which of the fields below holds.
        score: of a response; an expectation over labels may lie between integers.
        preferred: of a pair.
        swapped: the pair's second response was shown first.
        sample: which of several answers of the judge to the same question, from 0.
        reason: in a sentence, why there is no judgement.
        thinking: before the label; empty where the judge does not think.
        answer: all that the judge wrote, as it came.
        judge: a hash of everything the verdict depends on: model, prompt template, sampling,
            parser.
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
                raise UserError(f"a verdict has a {name} just when its outcome is {outcome}")
        judged = self.outcome in (Outcome.SCORE, Outcome.PREFERENCE, Outcome.TIE)
        if judged == bool(self.reason):
            raise UserError("a verdict has a reason just when it has no judgement")

    @property
    def judged(self) -> bool:
        """Whether the judge said something that counts."""
        return not self.reason


def _check_text(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str):
            raise UserError(f"{name} must be text, not {value!r}")
    if not getattr(record, names[0]):
        raise UserError(f"{names[0]} is empty")


def _messages(given: Any) -> tuple[Message, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise UserError(f"messages must be a list of at least one, not {given!r}")
    return tuple(message_of(message) for message in given)


def message_of(value: Any) -> Message:
    """Return the message that a file's row describes.

    Raises:
        UserError: There is no role or no text, or there is a further field with a value. Such a
            field (tool_calls, reasoning_content, weight) changes what the message means, so that
            the message cannot be kept without it.
    """
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"a message has a role and content, not {value!r:.60}")
    for name, content in value.items():
        if name not in ("role", "content") and content not in (None, "", [], {}):
            raise UserError(f"a message has {name!r}, which cannot be kept with it")
    if not {"role", "content"} <= set(value):
        raise UserError(f"a message has a role and content, not {', '.join(map(str, value))}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise UserError(f"a message's role is one of {', '.join(ROLES)}, not {role!r}")
    if not isinstance(content, str):
        kinds = {type(None): "null", list: "a list of parts"}
        kind = kinds.get(type(content), type(content).__name__)
        raise UserError(f"a message's content must be text, not {kind}")
    return Message(role, content)


def _prompt(given: Any) -> Prompt:
    if isinstance(given, Prompt):
        return given
    if not isinstance(given, Mapping):
        raise UserError(f"prompt must have fields, not {given!r}")
    return Prompt.from_row(given)


def _member[E: StrEnum](kind: type[E], name: str, given: Any) -> E:
    try:
        return kind(given)
    except ValueError:
        raise UserError(f"{name} is one of {', '.join(kind)}, not {given!r}") from None
