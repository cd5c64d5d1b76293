"""A response and its prompt, made ready for patterns: folded, and with what is quoted known."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from alignment.monitors.lengths import Lengths
from alignment.monitors.normalization import NormalizedText, normalize
from alignment.monitors.patterns import END, ENGLISH
from alignment.records import Message

_END_MARK = re.compile(r"[.!?](?=\s|\Z)|。")
# Scripts without spaces between words: each of their characters counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SENTENCE = re.compile(rf"[^{END}\n]+")

# Code and quotations, which the response does not say itself. All but fenced code ends on its line.
_QUOTED = re.compile(
    r"```(?:(?!```).)*+(?:```)?"
    r"|`[^`\n]{1,300}+`"
    r'|(?<![\w"])"[^"\n]{1,1000}+"(?!\w)'
    r"|(?:(?<=\n)|\A)[ ]?>[^\n]*+",
    re.DOTALL,
)
_MOST_QUOTED = 0.8  # of a text: beyond, the quotation is the response
_PROMPTS = 4096  # that are remembered, as each has several responses
_SHOWN = 60  # characters of an example


def shown(evidence: str) -> str:
    """What made a detector fire, as a short string in quotation marks on one line."""
    plain = " ".join(evidence.split())
    short = plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "…"
    return json.dumps(short, ensure_ascii=False)


def fold(text: str) -> str:
    """Return normalized text as patterns read it: lower case, with ends of sentences marked.

    It has the same length.
    """
    lower = text.lower() if text.isascii() else "".join(map(_lower, text))
    return _END_MARK.sub(END, lower.replace("*", " ").replace(END, " "))


def _lower(character: str) -> str:
    lower = character.lower()
    return lower if len(lower) == 1 else character


class ScoredSentence(NamedTuple):
    """A sentence of a response as the classifier reads it.

    Attributes:
        start: position of the sentence in the folded text.
        end: position after it.
        probability: probability that it is an attack of any form.
        form: most probable form of attack.
    """

    start: int
    end: int
    probability: float
    form: str


@dataclass(frozen=True)
class Reading:
    """What detectors see of one response.

    Attributes:
        messages: messages of the prompt.
        text: text of the response, as generated.
        usual: lengths of responses to such prompts, if they are known.
        scored: sentences with their probabilities; filled for a whole batch at once.
    """

    messages: tuple[Message, ...]
    text: str
    usual: Lengths | None = None
    scored: list[ScoredSentence] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, messages: Sequence[Message], text: str, usual: Lengths | None = None) -> "Reading":
        """Read a response to some messages."""
        return cls(tuple(messages), text, usual)

    @cached_property
    def normalized(self) -> NormalizedText:
        """The text in plain letters."""
        return normalize(self.text)

    @cached_property
    def folded(self) -> str:
        """The normalized text as patterns read it."""
        return fold(self.normalized.text)

    def piece(self, start: int, end: int) -> str:
        """Return what stands in the text, as generated, where the folded text has a span."""
        return self.normalized.original(start, end)

    @cached_property
    def words(self) -> list[str]:
        """Runs of letters and digits, folded; single characters of scripts without spaces."""
        return words_of(self.folded)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The positions of the words in the folded text."""
        return [word.span() for word in _WORD.finditer(self.folded)]

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        """The positions of the sentences, and of lines without an end mark, in the folded text."""
        spans = [match.span() for match in _SENTENCE.finditer(self.folded)]
        return [(start, end) for start, end in spans if not self.folded[start:end].isspace()]

    def asks_for(self, detector: str) -> bool:
        """Whether the user asks for what the detector looks for."""
        return detector in _asked(self.messages)

    def is_own(self, start: int, end: int) -> bool:
        """Return whether a span is neither quoted nor repeats the prompt."""
        if any(first <= start and end <= last for first, last in self.quoted_near(start, end)):
            return False
        return _squeezed(self.folded[start:end]) not in _given(self.messages)

    def quoted_near(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the positions of code and quotations that touch a span."""
        # They do not overlap, so that both their beginnings and their ends are in order.
        first = bisect_right(self.quoted, start, key=lambda span: span[1])
        return self.quoted[first : bisect_left(self.quoted, end, key=lambda span: span[0])]

    @cached_property
    def quoted(self) -> list[tuple[int, int]]:
        """The positions of code and quotations, unless nearly all of the text is one."""
        text = self.normalized.text
        spans = [match.span() for match in _QUOTED.finditer(text)]
        most = _MOST_QUOTED * len(text)
        return [(start, end) for start, end in spans if end - start < most]


def words_of(text: str) -> list[str]:
    """Return runs of letters and digits; each character of scripts without spaces."""
    return _WORD.findall(text)


@lru_cache(_PROMPTS)
def _asked(messages: tuple[Message, ...]) -> frozenset[str]:
    said = fold(normalize("\n".join(m.content for m in messages if m.role == "user")).text)
    return frozenset(name for name, pattern in ENGLISH.asked.items() if pattern.search(said))


@lru_cache(_PROMPTS)
def _given(messages: tuple[Message, ...]) -> str:
    return _squeezed(
        fold(normalize("\n".join(m.content for m in messages if m.role != "assistant")).text)
    )


def _squeezed(folded: str) -> str:
    return " ".join(folded.replace(END, " ").split())
