r"""The part of a response that holds its answer.

Rules of `auto`, the first that finds something decides and no other is tried: the last `\boxed{}`;
`#### ANSWER` in the last line; what follows the last "answer is" or "answer:" in its line.
"""

import re
from collections.abc import Callable
from typing import Literal

from alignment.judges.formats.parsing import CLOSE, OPEN

Extract = Literal["auto", "boxed", "hashes", "phrase", "last-line", "whole"]

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"\s*####(?!#)\s*(.*?)\s*\Z")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[ \t]*[:=]?[ \t*_]*", re.IGNORECASE)
# The end of the sentence or clause that states the answer.
_END = re.compile(r"[.;!?](?=\s|$)|,(?=\s)|\s(?:because|since|as|so)\s", re.IGNORECASE)
_LONGEST = 10_000  # characters of a line
_EMPHASIS = "*_`$ \t\r\n"
_MATH = re.compile(r"\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]", re.DOTALL)


def final_text(response: str) -> str | None:
    """Return a response without its thinking, or None if the thinking has no end."""
    if CLOSE in response:
        return response.rpartition(CLOSE)[2]
    return None if OPEN in response else response


def extract_answer(text: str, how: Extract = "auto") -> str | None:
    """Return the part of a text that holds the answer.

    Args:
        text: The text, without thinking.
        how: Where the answer is.

    Returns:
        The answer without emphasis, space and delimiters of LaTeX around it. None if the text has
        none; with `auto` also if none of the rules applies.
    """
    if how == "whole":
        return text.strip()
    for find in _RULES[how]:
        if (answer := find(text)) is not None:
            return without_marks(answer)
    return None


def without_marks(text: str) -> str:
    r"""Return a text without emphasis, space and one pair of `\( \)` or `\[ \]` around it."""
    text = text.strip(_EMPHASIS)
    formula = _MATH.fullmatch(text)
    return (formula[1] or formula[2] or "").strip(_EMPHASIS) if formula else text


def boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` whose braces are balanced, or None."""
    begins = {match.end() for match in _BOXED.finditer(text)}
    span: tuple[int, int] | None = None
    opened: list[int] = []
    for brace in re.finditer(r"[{}]", text) if begins else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (begin := opened.pop()) in begins and (not span or begin > span[0]):
            span = (begin, brace.start())
    return text[slice(*span)] if span else None


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _after_hashes(text: str) -> str | None:
    match = _HASHES.match(_last_line(text) or "")
    return match[1] if match else None


def _after_phrase(text: str) -> str | None:
    answer = None
    for phrase in _PHRASE.finditer(text):
        line, _, _ = text[phrase.end() : phrase.end() + _LONGEST].partition("\n")
        answer = line if line.strip() else answer
    return _END.split(answer, maxsplit=1)[0] if answer else None


_RULES: dict[str, tuple[Callable[[str], str | None], ...]] = {
    "auto": (boxed, _after_hashes, _after_phrase),
    "boxed": (boxed,),
    "hashes": (_after_hashes,),
    "phrase": (_after_phrase,),
    "last-line": (_last_line,),
}
