"""Assembly of parts into an indexed dataset, and its comparison with the parts and the source."""

import logging
import os
import random
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.preprocessing.parts import PartCounts, PartSpec
from megatron_ext.data.preprocessing.source_tokenizer import SourceTokenizer
from megatron_ext.errors import UserError

CHECKED_DOCUMENTS = 8  # documents of each split that are compared with the source
_FIRST_DOCUMENTS = 1000  # of each part among which they are chosen, as a shard may be a huge file


def import_megatron() -> Any:
    """Return Megatron's dataset module, imported without warnings about missing GPUs and packages.

    The import takes seconds, so that workers and errors in the arguments avoid it.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.disable(logging.WARNING)
    from megatron.core.datasets import indexed_dataset

    logging.disable(logging.NOTSET)
    return indexed_dataset


def write_dataset(split: str, specs: list[PartSpec], folder: Path, prefix: str) -> None:
    """Join the parts of a split, in order, into the indexed dataset at `prefix`.

    Args:
        split: One of `SPLITS`.
        specs: The parts.
        folder: Folder of the parts.
        prefix: Path of the dataset without its suffix.
    """
    dtype = np.dtype(specs[0].dtype)
    builder = import_megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for spec in specs:
        lengths = np.fromfile(folder / f"{spec.name}.{split}.len", dtype=np.int32)  # [documents]
        if lengths.size:
            path = folder / f"{spec.name}.{split}.bin"
            tokens = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # [tokens]
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [document.size])
    builder.finalize(f"{prefix}.idx")


def check_dataset(
    split: str,
    specs: list[PartSpec],
    tokenizer: SourceTokenizer,
    parts: list[PartCounts],
    prefix: str,
) -> str:
    """Read an indexed dataset back and compare it with the parts and the source.

    All of it is compared with the parts' counts and checksums, and some documents with their source
    text, tokenized by Megatron's own class.

    Args:
        split: One of `SPLITS`.
        specs: The parts.
        tokenizer: The tokenizer.
        parts: Their counts, in the same order.
        prefix: Path of the dataset without its suffix.

    Returns:
        A phrase that describes the result.

    Raises:
        UserError: The dataset differs.
    """
    dataset = import_megatron().IndexedDataset(prefix)
    documents = np.array([part["documents"][split] for part in parts])
    tokens = [part["tokens"][split] for part in parts]
    same = (
        np.array_equal(dataset.document_indices, np.arange(documents.sum() + 1))
        and dataset.sequence_lengths.sum(dtype=np.int64) == sum(tokens)
        and os.path.getsize(f"{prefix}.bin") == sum(tokens) * np.dtype(specs[0].dtype).itemsize
    )
    with open(f"{prefix}.bin", "rb") as file:
        for part, count in zip(parts, tokens):
            same = same and part["crc32"][split] == _crc32(file, count * dataset.index.dtype_size)
    encode, decode = tokenizer.reference()

    def encodable(text: str) -> bool:
        return tokenizer.encoder(specs[0].dtype).encode_documents([text]) != [None]

    choose = random.Random(specs[0].seed)
    reachable = documents.clip(max=_FIRST_DOCUMENTS).tolist()
    checked: set[tuple[int, int]] = set()
    exact = 0
    while same and len(checked) < min(CHECKED_DOCUMENTS, sum(reachable)):
        index = choose.choices(range(len(specs)), weights=documents.tolist())[0]
        ordinal = choose.randrange(reachable[index])
        if (index, ordinal) in checked:
            continue
        checked.add((index, ordinal))
        accepts = encodable if parts[index]["refused"] else None
        text = source_document(specs[index], split, ordinal, accepts)
        stored = dataset[int(documents[:index].sum()) + ordinal].tolist()
        same = stored == encode(text)
        exact += decode(stored[:-1]) == text
    if not same:
        raise UserError(
            f"The {split} dataset {prefix} differs from what was written when it is read back. "
            "Check the disk, remove the .parts folder and run the command again."
        )
    if len(checked) == 1:
        return f"verified; it {'decodes' if exact else 'does not decode'} to exactly its source"
    return f"verified; {exact} of {len(checked)} sampled documents decode to exactly their source"


def _crc32(file: BinaryIO, size: int) -> int:
    checksum = 0
    while size > 0 and (chunk := file.read(min(size, 1 << 24))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


def source_document(
    spec: PartSpec, split: str, ordinal: int, accepts: Callable[[str], bool] | None = None
) -> str:
    """Read a document of a part from the source again.

    Args:
        spec: The part.
        split: One of `SPLITS`.
        ordinal: Number of the document within the part and split, from 0.
        accepts: Function that returns whether the encoder accepted a text. Default: it accepted
            all.

    Raises:
        UserError: The part has fewer documents now.
    """
    for shard in spec.shards:
        for document in ShardReader(shard, spec.layout):
            if isinstance(document, MalformedRecord) or not document.strip():
                continue
            if spec.split_of(document) == split and (accepts is None or accepts(document)):
                if ordinal == 0:
                    return document
                ordinal -= 1
    raise UserError(f"{spec.shards[-1].path} changed while it was read. Run the command again.")
