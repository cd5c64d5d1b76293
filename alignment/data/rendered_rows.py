"""Texts of token ids in which control tokens and the trained part are marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.chat_prompts import decode_ids
from megatron_ext.chat_templates import control_tokens

_CONTROL, _TRAINED, _PLAIN = "\x1b[35;1m", "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sort.

    Attributes:
        text: Their text; the name of a control token.
        is_control: Whether it is a control token.
        is_trained: Whether the loss covers the tokens.
    """

    text: str
    is_control: bool
    is_trained: bool


def segments_of(tokenizer: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[Segment]:
    """Return the text of token ids in segments.

    Args:
        tokenizer: Tokenizer of transformers.
        prompt: Token ids of the prompt.
        completion: Token ids of the trained completion.
    """
    names, ids = control_tokens(tokenizer), [*prompt, *completion]
    segments: list[Segment] = []
    start = 0
    while start < len(ids):
        trained = start >= len(prompt)
        stop = start + 1
        if ids[start] in names:
            segments.append(Segment(names[ids[start]], True, trained))
        else:
            end = len(ids) if trained else len(prompt)
            while stop < end and ids[stop] not in names:
                stop += 1
            segments.append(Segment(_text(tokenizer, ids, start, stop), False, trained))
        start = stop
    return segments


def _text(tokenizer: Any, ids: Sequence[int], start: int, stop: int) -> str:
    """Return the text of ids after those before them; alone, SentencePiece drops their space."""
    before, text = decode_ids(tokenizer, ids[:start]), decode_ids(tokenizer, ids[:stop])
    if text.startswith(before):
        return text[len(before) :]
    return decode_ids(tokenizer, ids[start:stop])


def write_segments(segments: Sequence[Segment], color: bool) -> str:
    """Return segments as text, with control tokens and the trained part marked.

    Args:
        segments: The segments.
        color: Whether to mark them by color. Otherwise control tokens are in brackets, and
            [trained: and :trained] enclose the trained part.
    """
    return "".join(_marked(segments, color))


def _marked(segments: Sequence[Segment], color: bool) -> Iterator[str]:
    trained = False
    for segment in segments:
        if segment.is_trained and not trained and not color:
            yield "[trained:"
        trained = trained or segment.is_trained
        text = printable(segment.text)
        if color:
            style = _TRAINED if segment.is_trained else ""
            mark = _CONTROL + ("\x1b[4m" if segment.is_trained else "")
            yield f"{mark if segment.is_control else style}{text}{_PLAIN}"
        else:
            yield f"[{text}]" if segment.is_control else text
    if trained and not color:
        yield ":trained]"


def printable(text: str) -> str:
    """Return a text without characters that would control a terminal, which are escaped."""
    return "".join(
        c if c in "\n\t" or not _controls(c) else c.encode("unicode_escape").decode() for c in text
    )


def _controls(character: str) -> bool:
    code = ord(character)
    return code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
