"""Division of texts into windows of a model's context length."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import Shard, TextFormat, expand_inputs, format_of_suffix, plan_shards
from megatron_ext.errors import UserError

_PIECE = 1 << 16  # bytes of plain text that are tokenized at once


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
            self.layout = TextFormat(format_of_suffix(path) or "text", text_key)
            self.shards += plan_shards([path], self.layout, 1 << 62)
        self.size = sum(shard.size for shard in self.shards)

    def windows(self, tokenizer: Any, length: int) -> Iterator[Window]:
        """Yield windows of `length` tokens; the last one may be shorter.

        As in training, windows contain consecutive documents, with the ids of `DocumentTokens`. A
        plain file is one document; to bound the memory, it is tokenized in pieces of whole lines.

        Raises:
            UserError: A record is malformed.
        """
        encoder = DocumentTokens(tokenizer)
        pending: list[int] = []
        read = 0
        for shard in self.shards:
            reader = ShardReader(shard, self.layout)
            for tokens in _tokens(reader, encoder):
                pending += tokens
                full_length = len(pending) // length * length
                for start in range(0, full_length, length):
                    yield Window(pending[start : start + length], read + reader.consumed)
                del pending[:full_length]
            read += shard.size
        if pending:
            yield Window(pending, read)


def _tokens(reader: ShardReader, encoder: DocumentTokens) -> Iterator[list[int]]:
    """Yield the ids of the documents of a file, or of the pieces of its only document."""
    if reader.shard.format == "text":
        yield encoder.begin
        for text in reader.pieces(_PIECE):
            yield encoder.plain(text)
        yield encoder.end
        return
    for text in _check_records(reader):
        yield encoder.document(text)


def _check_records(reader: ShardReader) -> Iterator[str]:
    documents: Iterable[str | MalformedRecord] = reader
    for document in documents:
        if isinstance(document, MalformedRecord):
            raise UserError(
                f"{reader.shard.path}, line {document.line}: {document.reason}. "
                "Correct or remove this line."
            )
        yield document
