"""A response and its prompt, made ready for patterns: folded, and with what is quoted known."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from alignment.monitors.patterns import END, ENGLISH
from alignment.records import Message

# One character for one, so that a place in folded text is the same place in the text.
_PLAIN = str.maketrans({
    "‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', END: " ",
    "*": " ", "İ": "i", "‐": "-", "‑": "-", "–": "-", "—": "-",
})  # fmt: skip
_END_MARK = re.compile(r"[.!?](?=\s|\Z)")
_WORD = re.compile(r"\w+")

# Code and quotations, which the response does not say itself. All but fenced code ends on its line.
_QUOTED = re.compile(
    r"```(?:(?!```).)*+(?:```)?"
    r"|`[^`\n]{1,300}+`"
    r'|(?<![\w"])"[^"\n]{1,400}+"(?!\w)'
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
    """The text as patterns read it: lower case, plain quotes, ends of sentences marked.

    It has the same length.
    """
    return _END_MARK.sub(END, _plain(text).lower())


def _plain(text: str) -> str:
    if text.isascii():  # the same, and much faster
        return text.replace("*", " ").replace(END, " ")
    return text.translate(_PLAIN)


@dataclass(frozen=True)
class Reading:
    """What detectors see of one response.

    Attributes:
        messages: of the prompt.
        text: of the response, as generated.
    """

    messages: tuple[Message, ...]
    text: str

    @classmethod
    def of(cls, messages: Sequence[Message], text: str) -> "Reading":
        return cls(tuple(messages), text)

    @cached_property
    def folded(self) -> str:
        return fold(self.text)

    @cached_property
    def words(self) -> list[str]:
        """Runs of letters and digits, folded."""
        return words_of(self.folded)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Where the words are in the text."""
        return [word.span() for word in _WORD.finditer(self.folded)]

    def asks_for(self, detector: str) -> bool:
        """Whether the user asks for what the detector looks for."""
        return detector in _asked(self.messages)

    def is_own(self, found: re.Match[str]) -> bool:
        """Whether a match is the response's own saying: neither quoted nor given by the prompt."""
        if any(start <= found.start() and found.end() <= end for start, end in self._quoted):
            return False
        return _squeezed(found[0]) not in _given(self.messages)

    @cached_property
    def _quoted(self) -> list[tuple[int, int]]:
        spans = [found.span() for found in _QUOTED.finditer(_plain(self.text))]
        most = _MOST_QUOTED * len(self.text)
        return [(start, end) for start, end in spans if end - start < most]


def words_of(text: str) -> list[str]:
    """Runs of letters and digits."""
    return _WORD.findall(text)


@lru_cache(_PROMPTS)
def _asked(messages: tuple[Message, ...]) -> frozenset[str]:
    said = fold("\n".join(m.content for m in messages if m.role == "user"))
    return frozenset(name for name, pattern in ENGLISH.asked.items() if pattern.search(said))


@lru_cache(_PROMPTS)
def _given(messages: tuple[Message, ...]) -> str:
    return _squeezed(fold("\n".join(m.content for m in messages if m.role != "assistant")))


def _squeezed(folded: str) -> str:
    return " ".join(folded.replace(END, " ").split())
