"""Parts of preprocessing: the tokens of some shards, in files of the parts folder."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import Shard, TextFormat

SPLITS = ("train", "valid")
PartCounts = dict[str, Any]  # the counts that write_part returns
# Increase this whenever the same settings give other bytes, so that old parts are not reused.
FORMAT_VERSION = 1
MALFORMED_EXAMPLES = 20  # malformed lines that are listed for each shard, and in the manifest
# A file is small if it is below --shard-bytes divided by this number. A part holds many small
# files, up to that size together, because each part costs several fsyncs and takes about half a
# second per 4 MiB.
_SMALL = 16
# Characters and number of documents that are encoded at a time.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 1024
_END_IN_TEXT = "its text contains the tokenizer's end token, which would end the document there"


class Encoder(Protocol):
    """Encoder of documents."""

    def encode_documents(self, texts: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of each document's tokens and of the end-of-document id.

        A document is None if the end-of-document id is also within it.
        """
        ...


@dataclass(frozen=True)
class PartSpec:
    """Shards of one part, and everything that determines their tokens.

    Attributes:
        shards: One shard, or several small files in order.
        file_stamps: Modification time of each shard's file, in ns.
        layout: Format of the files.
        tokenizer_sha256: Digest of the tokenizer.
        eod: End-of-document id.
        parse_special: Whether names of special tokens in a text are these tokens.
        dtype: Data type of the tokens.
        valid_fraction: Share of documents for validation; 0.0 and 1.0 put all into one split.
        seed: Seed of the split.
    """

    shards: tuple[Shard, ...]
    file_stamps: tuple[int, ...]
    layout: TextFormat
    tokenizer_sha256: str
    eod: int
    parse_special: bool
    dtype: str
    valid_fraction: float
    seed: int

    @cached_property
    def name(self) -> str:
        """Name of the part's files, a digest of everything that determines its tokens."""
        identity = {**asdict(self), "version": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def size(self) -> int:
        """Size of the shards in bytes."""
        return sum(shard.size for shard in self.shards)

    def split_of(self, text: str) -> str:
        """Return the split of a document, from a hash of its text and the seed."""
        if self.valid_fraction in (0.0, 1.0):
            return "valid" if self.valid_fraction else "train"
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        chosen = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return "valid" if chosen else "train"


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete file so that its content is durable even after a power failure."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def group_shards(shards: list[Shard], shard_bytes: int) -> list[tuple[Shard, ...]]:
    """Group the shards of successive small files, in order; other shards form their own groups.

    The same shards give the same groups for any number of workers.

    Args:
        shards: All shards.
        shard_bytes: Value of --shard-bytes.
    """
    limit = shard_bytes // _SMALL
    groups: list[list[Shard]] = []
    size = 0  # of the last group
    for shard in shards:
        if not groups or size + shard.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.size
    return [tuple(group) for group in groups]


class _PartWriter:
    """Writer of the tokens of a part's documents into one file per split.

    Attributes:
        lengths: Number of tokens of each document, by split.
        checksums: CRC-32 of the tokens, by split.
        text_bytes: Size of the documents in UTF-8, by split.
        refused: Number of documents that the encoder refused.
    """

    def __init__(self, spec: PartSpec, files: dict[str, Any], encoder: Encoder) -> None:
        self._spec, self._files, self._encoder = spec, files, encoder
        self._itemsize = np.dtype(spec.dtype).itemsize
        self._batch: list[tuple[int, str]] = []  # lines and documents
        self._characters = 0
        self.lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        self.checksums = dict.fromkeys(SPLITS, 0)
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self.refused = 0

    def write(self, line: int, document: str) -> list[MalformedRecord]:
        """Add a document, and return those that turned out to be malformed."""
        self._batch.append((line, document))
        self._characters += len(document)
        full = self._characters >= _BATCH_CHARACTERS or len(self._batch) >= _BATCH_DOCUMENTS
        return self.flush() if full else []

    def flush(self) -> list[MalformedRecord]:
        """Encode and write the documents added so far, and return the malformed ones."""
        malformed = []
        encoded = self._encoder.encode_documents([document for _, document in self._batch])
        for (line, document), tokens in zip(self._batch, encoded, strict=True):
            if tokens is None:
                malformed.append(MalformedRecord(line, _END_IN_TEXT))
                continue
            split = self._spec.split_of(document)
            self.checksums[split] = zlib.crc32(tokens, self.checksums[split])
            self._files[split].write(tokens)
            self.text_bytes[split] += len(document.encode())
            self.lengths[split].append(len(tokens) // self._itemsize)
        self._batch, self._characters = [], 0
        self.refused += len(malformed)
        return malformed


def write_part(spec: PartSpec, folder: Path, encoder: Encoder, consumed: Any) -> PartCounts:
    """Tokenize the shards of a part into files.

    The files are NAME.SPLIT.bin (tokens), NAME.SPLIT.len (number of tokens of each document, int32)
    and NAME.json (counts). NAME.json is written last and marks a complete part.

    Args:
        spec: The part.
        folder: Folder of the parts.
        encoder: Encoder of its documents.
        consumed: Shared counter of the bytes that all workers have read.

    Returns:
        The counts: documents, tokens, bytes of text and CRC-32 by split, documents that the encoder
        refused, and the counts of each shard.
    """
    temporary = {split: folder / f"{spec.name}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(temporary[split], "wb")) for split in SPLITS}
        writer = _PartWriter(spec, files, encoder)
        shards = [_write_shard(shard, spec.layout, writer, consumed) for shard in spec.shards]
    for split in SPLITS:
        publish(temporary[split], folder / f"{spec.name}.{split}.bin")
        np.array(writer.lengths[split], dtype=np.int32).tofile(temporary[split])
        publish(temporary[split], folder / f"{spec.name}.{split}.len")
    part = {
        "documents": {split: len(writer.lengths[split]) for split in SPLITS},
        "tokens": {split: sum(writer.lengths[split]) for split in SPLITS},
        "bytes": writer.text_bytes,
        "crc32": writer.checksums,
        "refused": writer.refused,
        "shards": shards,
    }
    temporary["train"].write_text(json.dumps(part))
    publish(temporary["train"], folder / f"{spec.name}.json")
    return part


def _write_shard(
    shard: Shard, layout: TextFormat, writer: _PartWriter, consumed: Any
) -> PartCounts:
    """Write a shard's documents and return its counts, summed over the splits."""
    reader = ShardReader(shard, layout)
    malformed: list[MalformedRecord] = []
    malformed_count = empty = documents = tokens = reported = 0
    before = {split: len(writer.lengths[split]) for split in SPLITS}

    def report(done: int) -> None:
        nonlocal reported
        with consumed.get_lock():
            consumed.value += done - reported
        reported = done

    def skip(records: list[MalformedRecord]) -> None:
        nonlocal malformed, malformed_count
        malformed_count += len(records)
        malformed = sorted([*malformed, *records])[:MALFORMED_EXAMPLES]

    for document in reader:
        if reader.consumed - reported > 1 << 17:
            report(reader.consumed)
        if isinstance(document, MalformedRecord):
            skip([document])
        elif not document.strip():
            empty += 1
        else:
            skip(writer.write(reader.lines, document))
    skip(writer.flush())
    report(shard.size)
    for split in SPLITS:
        lengths = writer.lengths[split][before[split] :]
        documents += len(lengths)
        tokens += sum(lengths)
    return {
        "lines": reader.lines,
        "documents": documents,
        "tokens": tokens,
        "empty": empty,
        "malformed": malformed_count,
        "malformed_lines": malformed,
    }


def read_part(spec: PartSpec, folder: Path) -> PartCounts | None:
    """Return the counts of a finished part, or None if it is missing or incomplete."""
    try:
        part = json.loads((folder / f"{spec.name}.json").read_text())
        is_complete = all(
            (folder / f"{spec.name}.{split}.{suffix}").stat().st_size == part[count][split] * size
            for suffix, count, size in (
                ("bin", "tokens", np.dtype(spec.dtype).itemsize),
                ("len", "documents", np.dtype(np.int32).itemsize),
            )
            for split in SPLITS
        )
        is_complete = is_complete and len(part["shards"]) == len(spec.shards) and "bytes" in part
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return part if is_complete else None
