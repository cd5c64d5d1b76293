"""Responses in the normalized form that detectors examine."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from alignment.monitors.lengths import ReferenceLengths
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

# Code and quotations do not count as statements of the response. All but fenced code end on their
# line.
_QUOTED = re.compile(
    r"```(?:(?!```).)*+(?:```)?"
    r"|`[^`\n]{1,300}+`"
    r'|(?<![\w"])"[^"\n]{1,1000}+"(?!\w)'
    r"|(?:(?<=\n)|\A)[ ]?>[^\n]*+",
    re.DOTALL,
)
_MAX_QUOTED = 0.8  # share of a text above which a quotation is the response itself
_CACHED_PROMPTS = 4096  # each prompt has several responses
_MAX_SHOWN = 60  # characters of an example


def printable(evidence: str) -> str:
    """Return evidence as a short string in quotation marks on one line."""
    plain = " ".join(evidence.split())
    short = plain if len(plain) <= _MAX_SHOWN else plain[:_MAX_SHOWN] + "…"
    return json.dumps(short, ensure_ascii=False)


def fold(text: str) -> str:
    """Return normalized text in the form that patterns match, of the same length.

    Letters are lower case, and ends of sentences are marked.
    """
    lower = text.lower() if text.isascii() else "".join(map(_lower, text))
    return _END_MARK.sub(END, lower.replace("*", " ").replace(END, " "))


def _lower(character: str) -> str:
    lower = character.lower()
    return lower if len(lower) == 1 else character


class ScoredSentence(NamedTuple):
    """Sentence of a response with the classifier's verdict.

    Attributes:
        start: Position of the sentence in the folded text.
        end: Position after its last character.
        probability: Probability that it is an attack of any form.
        form: Most probable form of attack.
    """

    start: int
    end: int
    probability: float
    form: str


@dataclass(frozen=True)
class NormalizedResponse:
    """Response with its prompt, normalized for detectors.

    Attributes:
        messages: Messages of the prompt.
        text: Text of the response, as generated.
        reference_lengths: Lengths of reference responses to such prompts, if they are known.
        scored: Sentences with the classifier's probabilities, filled for a whole batch at once.
    """

    messages: tuple[Message, ...]
    text: str
    reference_lengths: ReferenceLengths | None = None
    scored: list[ScoredSentence] = field(default_factory=list, compare=False)

    @classmethod
    def create(
        cls,
        messages: Sequence[Message],
        text: str,
        reference_lengths: ReferenceLengths | None = None,
    ) -> "NormalizedResponse":
        """Return the response to some messages."""
        return cls(tuple(messages), text, reference_lengths)

    @cached_property
    def normalized(self) -> NormalizedText:
        """Text in plain letters."""
        return normalize(self.text)

    @cached_property
    def folded(self) -> str:
        """Normalized text in the form that patterns match."""
        return fold(self.normalized.text)

    def piece(self, start: int, end: int) -> str:
        """Return the text, as generated, at a span of the folded text."""
        return self.normalized.original(start, end)

    @cached_property
    def words(self) -> list[str]:
        """Words of the folded text, as `words_of` returns them."""
        return words_of(self.folded)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Positions of the words in the folded text."""
        return [word.span() for word in _WORD.finditer(self.folded)]

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        """Positions of sentences, and of lines without an end mark, in the folded text."""
        spans = [match.span() for match in _SENTENCE.finditer(self.folded)]
        return [(start, end) for start, end in spans if not self.folded[start:end].isspace()]

    def asks_for(self, detector: str) -> bool:
        """Return whether the user requests what the detector searches for."""
        return detector in _requested_detectors(self.messages)

    def is_own(self, start: int, end: int) -> bool:
        """Return whether a span is neither quoted nor repeats the prompt."""
        if any(first <= start and end <= last for first, last in self.quoted_near(start, end)):
            return False
        return _squeezed(self.folded[start:end]) not in _squeezed_prompt(self.messages)

    def quoted_near(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the positions of code and quotations that touch a span."""
        # They do not overlap, so that both their beginnings and their ends are in order.
        first = bisect_right(self.quoted, start, key=lambda span: span[1])
        return self.quoted[first : bisect_left(self.quoted, end, key=lambda span: span[0])]

    @cached_property
    def quoted(self) -> list[tuple[int, int]]:
        """Positions of code and quotations, except a quotation of nearly the whole text."""
        text = self.normalized.text
        spans = [match.span() for match in _QUOTED.finditer(text)]
        longest = _MAX_QUOTED * len(text)
        return [(start, end) for start, end in spans if end - start < longest]


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits.

    Each character of a script without spaces, such as Chinese, is a word.
    """
    return _WORD.findall(text)


@lru_cache(_CACHED_PROMPTS)
def _requested_detectors(messages: tuple[Message, ...]) -> frozenset[str]:
    request = fold(normalize("\n".join(m.content for m in messages if m.role == "user")).text)
    return frozenset(name for name, pattern in ENGLISH.requested.items() if pattern.search(request))


@lru_cache(_CACHED_PROMPTS)
def _squeezed_prompt(messages: tuple[Message, ...]) -> str:
    return _squeezed(
        fold(normalize("\n".join(m.content for m in messages if m.role != "assistant")).text)
    )


def _squeezed(folded: str) -> str:
    return " ".join(folded.replace(END, " ").split())
