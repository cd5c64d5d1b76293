"""Parts: a shard's tokens as files, kept in a folder until the output is complete."""

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

from tools.documents import Malformed, ShardReader
from tools.preprocessing.encoding import DocumentEncoder
from tools.shards import Layout, Shard

SPLITS = ("train", "valid")
Part = dict[str, Any]  # what write_part says of a finished part
# Raised whenever the same settings come to give other bytes, so that old parts are not reused.
FORMAT_VERSION = 1
KEPT_MALFORMED = 20  # of each shard, and in the manifest


@dataclass(frozen=True)
class Work:
    """A shard and everything that decides the tokens made from it."""

    shard: Shard
    file_stamp: int  # modification time of the shard's file in ns
    layout: Layout
    tokenizer_model: str
    tokenizer_sha256: str
    eod: int
    dtype: str
    valid_fraction: float  # 0.0 and 1.0: all documents to one split
    seed: int

    @cached_property
    def name(self) -> str:
        """A name that changes with the content: a part is reused only for the same work."""
        identity = {**asdict(self), "tokenizer_model": "", "version": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    def split_of(self, text: str) -> str:
        """The document's split, from a hash of its text and the seed."""
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


def write_part(work: Work, folder: Path, encode: DocumentEncoder, consumed: Any) -> Part:
    """Tokenize a shard into NAME.SPLIT.bin (tokens), NAME.SPLIT.len (int32 tokens of each document)
    and, last, NAME.json (counts), which is returned and whose presence says that all is there."""
    reader = ShardReader(work.shard, work.layout)
    temporary = {split: folder / f"{work.name}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    checksums = dict.fromkeys(SPLITS, 0)
    malformed: list[Malformed] = []
    malformed_count = empty = reported = 0
    itemsize = np.dtype(work.dtype).itemsize
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(temporary[split], "wb")) for split in SPLITS}
        for document in reader:
            if reader.consumed - reported > 1 << 17:
                with consumed.get_lock():
                    consumed.value += reader.consumed - reported
                reported = reader.consumed
            if isinstance(document, Malformed):
                malformed_count += 1
                malformed += [document][: KEPT_MALFORMED - len(malformed)]
            elif not document.strip():
                empty += 1
            else:
                split = work.split_of(document)
                tokens = encode(document)
                checksums[split] = zlib.crc32(tokens, checksums[split])
                files[split].write(tokens)
                lengths[split].append(len(tokens) // itemsize)
    with consumed.get_lock():
        consumed.value += work.shard.size - reported
    for split in SPLITS:
        publish(temporary[split], folder / f"{work.name}.{split}.bin")
        np.array(lengths[split], dtype=np.int32).tofile(temporary[split])
        publish(temporary[split], folder / f"{work.name}.{split}.len")
    part = {
        "documents": {split: len(lengths[split]) for split in SPLITS},
        "tokens": {split: sum(lengths[split]) for split in SPLITS},
        "crc32": checksums,
        "lines": reader.lines,
        "empty": empty,
        "malformed": malformed_count,
        "malformed_lines": malformed,
    }
    temporary["train"].write_text(json.dumps(part))
    publish(temporary["train"], folder / f"{work.name}.json")
    return part


def read_part(work: Work, folder: Path) -> Part | None:
    """The counts of a finished part, or None when it has yet to be written."""
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
    except (FileNotFoundError, ValueError):
        return None
    return part if whole else None
