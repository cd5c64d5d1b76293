"""Sequences of tokens from an indexed dataset or text files, for tools that inspect a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import TextFormat, expand_inputs, plan_shards
from megatron_ext.data.tokenizer_identity import check_dataset_tokenizer
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.inference.loading import TrainedModel

_SHARD_BYTES = 1 << 24


def sequences_of(
    inputs: list[str], trained: "TrainedModel", length: int, tokens: int, flag: str = "--data"
) -> Tensor:
    """Return the first tokens of a text, its documents concatenated, divided into sequences.

    Args:
        inputs: Prefix of an indexed dataset, or text files and globs as in preprocess_data.
        trained: The model whose tokenizer encodes text files and ends each document. An indexed
            dataset must have been made with the same tokenizer.
        length: Tokens per sequence.
        tokens: Maximum number of tokens to read.
        flag: Name of the flag, for error messages.

    Returns:
        The complete sequences, int64 `[sequences, length]`.

    Raises:
        UserError: The data does not exist or has fewer tokens than one sequence.
    """
    if len(inputs) == 1 and Path(inputs[0] + ".idx").is_file():
        check_dataset_tokenizer(inputs[0], trained.args)
        documents = _indexed(inputs[0])
    else:
        documents = _texts(inputs, trained.tokenizer, flag)
    parts: list[np.ndarray[Any, Any]] = []
    read = 0
    for document in documents:
        parts.append(document)
        read += len(document)
        if read >= tokens:
            break
    count = min(read, tokens) // length
    if not count:
        raise UserError(
            f"{flag} {inputs[0]} has {read} tokens, which is less than one sequence of {length}. "
            "Give more text or shorter sequences."
        )
    stream = np.concatenate(parts)[: count * length]
    return torch.from_numpy(stream).view(count, length)


def _indexed(prefix: str) -> Iterator[np.ndarray[Any, Any]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    # astype copies, because the dataset unmaps its file when it is deleted.
    return (dataset[number].astype(np.int64) for number in range(len(dataset)))


def _texts(inputs: list[str], tokenizer: Any, flag: str) -> Iterator[np.ndarray[Any, Any]]:
    layout = TextFormat()
    encoder = DocumentTokens(tokenizer)
    for shard in plan_shards(expand_inputs(inputs, flag), layout, _SHARD_BYTES):
        for document in ShardReader(shard, layout):
            if isinstance(document, MalformedRecord):
                raise UserError(
                    f"Line {document.line} of {shard.path} is malformed: {document.reason}. Fix or "
                    "remove it."
                )
            yield np.array(encoder.document(document), dtype=np.int64)
