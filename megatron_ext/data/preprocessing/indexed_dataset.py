"""Parts joined into an indexed dataset, and what was written compared with them and the source."""

import logging
import os
import random
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.data.documents import ShardReader
from megatron_ext.data.preprocessing.parts import PartCounts, PartSpec
from megatron_ext.errors import UserError

CHECKED_DOCUMENTS = 8  # of each split, compared with the source


def import_megatron() -> Any:
    """Megatron's dataset module, without the warnings of missing GPUs, packages and ranks: none is
    used here. It takes seconds, so workers and errors in the arguments go without."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.disable(logging.WARNING)
    from megatron.core.datasets import indexed_dataset

    logging.disable(logging.NOTSET)
    return indexed_dataset


def write_dataset(split: str, works: list[PartSpec], folder: Path, prefix: str) -> None:
    """Join the parts of a split, in order, into the indexed dataset at `prefix`."""
    dtype = np.dtype(works[0].dtype)
    builder = import_megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for work in works:
        lengths = np.fromfile(folder / f"{work.name}.{split}.len", dtype=np.int32)  # [documents]
        if lengths.size:
            path = folder / f"{work.name}.{split}.bin"
            tokens = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # [tokens]
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [document.size])
    builder.finalize(f"{prefix}.idx")


def check_dataset(split: str, works: list[PartSpec], parts: list[PartCounts], prefix: str) -> str:
    """Read an indexed dataset back and compare all of it with the parts' counts and checksums, and
    some documents with the source tokenized by Megatron's own class; a sentence on the outcome.

    Raises:
        UserError: it differs.
    """
    from megatron.core.tokenizers import MegatronTokenizer

    dataset = import_megatron().IndexedDataset(prefix)
    documents = np.array([part["documents"][split] for part in parts])
    tokens = [part["tokens"][split] for part in parts]
    same = (
        np.array_equal(dataset.document_indices, np.arange(documents.sum() + 1))
        and dataset.sequence_lengths.sum(dtype=np.int64) == sum(tokens)
        and os.path.getsize(f"{prefix}.bin") == sum(tokens) * np.dtype(works[0].dtype).itemsize
    )
    with open(f"{prefix}.bin", "rb") as file:
        for part, count in zip(parts, tokens):
            same = same and part["crc32"][split] == _crc32(file, count * dataset.index.dtype_size)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=works[0].tokenizer_model, metadata_path={"library": "sentencepiece"}
    )
    choose = random.Random(works[0].seed)
    checked = exact = 0
    while same and checked < CHECKED_DOCUMENTS:
        index = choose.choices(range(len(works)), weights=documents.tolist())[0]
        ordinal = choose.randrange(min(documents[index], 1000))  # a shard may be a huge file
        text = source_document(works[index], split, ordinal)
        stored = dataset[int(documents[:index].sum()) + ordinal].tolist()
        same = stored == [*tokenizer.tokenize(text), tokenizer.eod]
        exact += tokenizer.detokenize(stored[:-1]) == text
        checked += 1
    if not same:
        raise UserError(
            f"the {split} dataset read back differs from what was written: "
            f"remove the .parts folder and run again, and check the disk"
        )
    return f"read back and equal; {exact} of {checked} documents decode to exactly their source"


def _crc32(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (chunk := file.read(min(size, 1 << 24))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


def source_document(work: PartSpec, split: str, ordinal: int) -> str:
    """Return a part's document number `ordinal` of a split, read from the source again."""
    for shard in work.shards:
        for document in ShardReader(shard, work.layout):
            if isinstance(document, str) and document.strip() and work.split_of(document) == split:
                if ordinal == 0:
                    return document
                ordinal -= 1
    raise UserError(f"{work.shards[-1].path} changed while it was read: run again")
