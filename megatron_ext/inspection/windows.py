"""Division of texts into windows of a model's context length."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import Shard, TextFormat, expand_inputs, format_of_suffix, plan_shards
from megatron_ext.errors import UserError

_PIECE = 1 << 16  # characters of plain text that are tokenized at once


class Window(NamedTuple):
    """Window of tokens.

    Attributes:
        tokens: Token ids, at most as many as the context length.
        bytes_read: Bytes of the domain's files read so far.
    """

    tokens: list[int]
    bytes_read: int


class Domain:
    """Files with one kind of text.

    Attributes:
        name: Name of the domain.
        shards: The files.
        size: Size of all files in bytes.

    Args:
        name: Name of the domain.
        patterns: Paths and globs. A file is plain text unless it has the suffix of another format.
        text_key: Field or column with the text.

    Raises:
        UserError: A file does not exist or is empty.
    """

    def __init__(self, name: str, patterns: list[str], text_key: str) -> None:
        self.name = name
        self.shards: list[Shard] = []
        for path in expand_inputs(patterns, f"--domain {name}"):
            # Plain text is read by lines to bound the memory, and joined again.
            kind = format_of_suffix(path) or "text"
            self.layout = TextFormat(kind, text_key, separator="\n")
            self.shards += plan_shards([path], self.layout, 1 << 62)
        self.size = sum(shard.size for shard in self.shards)

    def windows(self, tokenizer: Any, length: int) -> Iterator[Window]:
        """Yield windows of `length` tokens; the last one may be shorter.

        As in training, windows contain consecutive documents, each followed by the tokenizer's end
        of document.

        Raises:
            UserError: A record is malformed.
        """
        end = [] if tokenizer.eod is None else [tokenizer.eod]
        pending: list[int] = []
        read = 0
        for shard in self.shards:
            reader = ShardReader(shard, self.layout)
            for text, ends in _pieces(reader):
                pending += tokenizer.tokenize(text) if text else []
                pending += end if ends else []
                full_length = len(pending) // length * length
                for start in range(0, full_length, length):
                    yield Window(pending[start : start + length], read + reader.consumed)
                del pending[:full_length]
            read += shard.size
        if pending:
            yield Window(pending, read)


def _pieces(reader: ShardReader) -> Iterator[tuple[str, bool]]:
    """Yield texts, and whether each one ends a document."""
    documents = _check_records(reader)
    if reader.shard.format != "text":
        yield from ((text, True) for text in documents)
        return
    lines: list[str] = []
    characters = 0
    for line in documents:
        lines.append(line + "\n")
        characters += len(line)
        if characters >= _PIECE:
            yield "".join(lines), False
            lines, characters = [], 0
    yield "".join(lines), True


def _check_records(reader: ShardReader) -> Iterator[str]:
    documents: Iterable[str | MalformedRecord] = reader
    for document in documents:
        if isinstance(document, MalformedRecord):
            raise UserError(
                f"{reader.shard.path}, line {document.line}: {document.reason}. "
                "Correct or remove this line."
            )
        yield document
