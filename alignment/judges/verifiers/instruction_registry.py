"""Register of checks of instructions, and the words and sentences that they count."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]
CHECKS: dict[str, Check] = {}
"""Check of each instruction: whether a response that is not empty follows it."""


def instruction(name: str) -> Callable[[Check], Check]:
    """Register the check of an instruction."""

    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


def words_of(text: str) -> list[str]:
    """Return the words of a text, which are runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, which end at `.`, `!`, `?` or a line break."""
    return [part for part in re.split(r"(?<=[.!?])[\"'”’)]*\s+|\n+", text) if words_of(part)]


def occurrences(word: str, text: str) -> int:
    """Return how often a word or phrase occurs, in upper or lower case, as whole words."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def spaced_words(text: str) -> list[str]:
    """Return the words between spaces in lower case, each without its punctuation."""
    words = (re.sub(r"\W", "", word).lower() for word in text.split())
    return [word for word in words if word]


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def ends_of(text: str) -> Counter[str]:
    """Return the number of sentences that end at each mark."""
    return Counter(sentence.rstrip("\"'”’) ")[-1:] for sentence in sentences_of(text))
