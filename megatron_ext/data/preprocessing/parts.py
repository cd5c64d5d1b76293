"""Parts: the tokens of some shards as files, kept in a folder until the output is complete."""

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.preprocessing.encoding import DocumentEncoder
from megatron_ext.data.shards import Shard, TextFormat

SPLITS = ("train", "valid")
PartCounts = dict[str, Any]  # what write_part returns of a finished part
# Raised whenever the same settings come to give other bytes, so that old parts are not reused.
FORMAT_VERSION = 1
KEPT_MALFORMED = 20  # of each shard, and in the manifest
# Files below this share of --shard-bytes are small: a part holds many, up to this share together.
# Each part costs several fsyncs, and one of 4 MiB takes a process about half a second.
_SMALL = 16


@dataclass(frozen=True)
class PartSpec:
    """Shards that make one part, and everything that decides the tokens made from them.

    Attributes:
        shards: One shard, or small files in their order.
        file_stamps: Modification time of each shard's file in ns.
        valid_fraction: Share of documents for validation; 0.0 and 1.0 put all into one split.
    """

    shards: tuple[Shard, ...]
    file_stamps: tuple[int, ...]
    layout: TextFormat
    tokenizer_model: str
    tokenizer_sha256: str
    eod: int
    dtype: str
    valid_fraction: float
    seed: int

    @cached_property
    def name(self) -> str:
        """A name that changes with the content: a part is reused only for the same work."""
        identity = {**asdict(self), "tokenizer_model": "", "version": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)

    def split_of(self, text: str) -> str:
        """Return the document's split, from a hash of its text and the seed."""
        if self.valid_fraction in (0.0, 1.0):
            return "valid" if self.valid_fraction else "train"
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        chosen = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return "valid" if chosen else "train"


def publish(temporary: Path, final: Path) -> None:
    """Give a complete file its name, such that it has all its content even after a power cut."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def group_shards(shards: list[Shard], shard_bytes: int) -> list[tuple[Shard, ...]]:
    """Put the shards of successive small files together, in order; others stay alone.

    The same shards always give the same groups, whatever the number of workers.
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
    """Writes the tokens of a part's documents, split by split."""

    def __init__(self, work: PartSpec, files: dict[str, Any], encode: DocumentEncoder) -> None:
        self._work, self._files, self._encode = work, files, encode
        self._itemsize = np.dtype(work.dtype).itemsize
        self.lengths: dict[str, list[int]] = {split: [] for split in SPLITS}  # tokens of documents
        self.checksums = dict.fromkeys(SPLITS, 0)

    def write(self, document: str) -> None:
        split = self._work.split_of(document)
        tokens = self._encode(document)
        self.checksums[split] = zlib.crc32(tokens, self.checksums[split])
        self._files[split].write(tokens)
        self.lengths[split].append(len(tokens) // self._itemsize)


def write_part(work: PartSpec, folder: Path, encode: DocumentEncoder, consumed: Any) -> PartCounts:
    """Tokenize shards into NAME.SPLIT.bin (tokens), NAME.SPLIT.len (int32 tokens of each document)
    and, last, NAME.json (counts), whose presence means that all is there.

    Returns:
        The counts: documents, tokens and crc32 by split, and for each shard its own counts.
    """
    temporary = {split: folder / f"{work.name}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(temporary[split], "wb")) for split in SPLITS}
        writer = _PartWriter(work, files, encode)
        shards = [_write_shard(shard, work.layout, writer, consumed) for shard in work.shards]
    for split in SPLITS:
        publish(temporary[split], folder / f"{work.name}.{split}.bin")
        np.array(writer.lengths[split], dtype=np.int32).tofile(temporary[split])
        publish(temporary[split], folder / f"{work.name}.{split}.len")
    part = {
        "documents": {split: len(writer.lengths[split]) for split in SPLITS},
        "tokens": {split: sum(writer.lengths[split]) for split in SPLITS},
        "crc32": writer.checksums,
        "shards": shards,
    }
    temporary["train"].write_text(json.dumps(part))
    publish(temporary["train"], folder / f"{work.name}.json")
    return part


def _write_shard(
    shard: Shard, layout: TextFormat, writer: _PartWriter, consumed: Any
) -> PartCounts:
    """Write a shard's documents and return its counts, over all splits."""
    reader = ShardReader(shard, layout)
    malformed: list[MalformedRecord] = []
    malformed_count = empty = documents = tokens = reported = 0
    before = {split: len(writer.lengths[split]) for split in SPLITS}

    def report(done: int) -> None:
        nonlocal reported
        with consumed.get_lock():
            consumed.value += done - reported
        reported = done

    for document in reader:
        if reader.consumed - reported > 1 << 17:
            report(reader.consumed)
        if isinstance(document, MalformedRecord):
            malformed_count += 1
            malformed += [document][: KEPT_MALFORMED - len(malformed)]
        elif not document.strip():
            empty += 1
        else:
            writer.write(document)
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


def read_part(work: PartSpec, folder: Path) -> PartCounts | None:
    """Return the counts of a finished part, or None when it has yet to be written."""
    try:
        part = json.loads((folder / f"{work.name}.json").read_text())
        whole = all(
            (folder / f"{work.name}.{split}.{suffix}").stat().st_size == part[of][split] * size
            for suffix, of, size in (
                ("bin", "tokens", np.dtype(work.dtype).itemsize),
                ("len", "documents", np.dtype(np.int32).itemsize),
            )
            for split in SPLITS
        )
        whole = whole and len(part["shards"]) == len(work.shards)
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return part if whole else None
