"""Texts as windows of tokens that a model takes at once."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import Shard, TextFormat, expand_inputs, format_of_suffix, plan_shards
from megatron_ext.errors import UserError

_PIECE = 1 << 16  # characters of a plain text that are tokenised at once


class Window(NamedTuple):
    """At most as many tokens as the model takes, and how much of the files is read by then."""

    tokens: list[int]
    bytes_read: int


class Domain:
    """Files of one kind of text.

    Attributes:
        size: of the files, bytes.

    Args:
        patterns: paths and globs; a file is plain text unless its suffix says otherwise.
        text_key: the field or column of the text.

    Raises:
        UserError: a file is not there or empty.
    """

    def __init__(self, name: str, patterns: list[str], text_key: str) -> None:
        self.name = name
        self.shards: list[Shard] = []
        for path in expand_inputs(patterns, f"--domain {name}"):
            # A plain text is read by lines, so that memory stays bounded, and put together again.
            kind = format_of_suffix(path) or "text"
            self.layout = TextFormat(kind, text_key, separator="\n")
            self.shards += plan_shards([path], self.layout, 1 << 62)
        self.size = sum(shard.size for shard in self.shards)

    def windows(self, tokenizer: Any, length: int) -> Iterator[Window]:
        """Windows of `length` tokens, the last may be shorter.

        Documents follow each other in a window, each ended by the tokenizer's end of document, as
        they do in training.
        """
        end = [] if tokenizer.eod is None else [tokenizer.eod]
        held: list[int] = []
        read = 0
        for shard in self.shards:
            reader = ShardReader(shard, self.layout)
            for text, ends in _pieces(reader):
                held += tokenizer.tokenize(text) if text else []
                held += end if ends else []
                whole = len(held) // length * length
                for start in range(0, whole, length):
                    yield Window(held[start : start + length], read + reader.consumed)
                del held[:whole]
            read += shard.size
        if held:
            yield Window(held, read)


def _pieces(reader: ShardReader) -> Iterator[tuple[str, bool]]:
    """Texts, and whether each is the end of a document."""
    documents = _sound(reader)
    if reader.shard.format != "text":
        yield from ((text, True) for text in documents)
        return
    lines: list[str] = []
    held = 0
    for line in documents:
        lines.append(line + "\n")
        held += len(line)
        if held >= _PIECE:
            yield "".join(lines), False
            lines, held = [], 0
    yield "".join(lines), True


def _sound(reader: ShardReader) -> Iterator[str]:
    documents: Iterable[str | MalformedRecord] = reader
    for document in documents:
        if isinstance(document, MalformedRecord):
            raise UserError(
                f"{reader.shard.path}, line {document.line}: {document.reason}: mend or remove it"
            )
        yield document
