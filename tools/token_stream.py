"""Sequences of tokens out of an indexed dataset or text files, for tools that look at a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError
from tools.documents import Malformed, ShardReader
from tools.shards import Layout, expand_inputs, plan_shards

_SHARD_BYTES = 1 << 24


def sequences_of(
    inputs: list[str], tokenizer: Any, length: int, tokens: int, flag: str = "--data"
) -> Tensor:
    """The first tokens of some text, documents end to end, cut into sequences.

    Args:
        inputs: prefix of an indexed dataset, or text files and globs as preprocess_data takes them.
        tokenizer: Megatron's; text files need it, and its end-of-document token between them.
        length: of a sequence.
        tokens: to read at most.
        flag: to name when something is wrong.

    Returns:
        int64 `[sequences, length]`, as many whole ones as there are.

    Raises:
        UserError: there is no such data, or not one whole sequence of it.
    """
    indexed = len(inputs) == 1 and Path(inputs[0] + ".idx").is_file()
    documents = _indexed(inputs[0]) if indexed else _texts(inputs, tokenizer, flag)
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
            f"{flag} {inputs[0]} has {read} tokens: not one sequence of {length}: give more"
        )
    stream = np.concatenate(parts)[: count * length]
    if (highest := int(stream.max())) >= tokenizer.vocab_size:
        raise UserError(
            f"{flag} {inputs[0]} has token {highest}, and the model's tokenizer only "
            f"{tokenizer.vocab_size}: it was made with another one"
        )
    return torch.from_numpy(stream).view(count, length)


def _indexed(prefix: str) -> Iterator[np.ndarray[Any, Any]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    # Copies: the dataset unmaps its file when it goes.
    return (dataset[number].astype(np.int64) for number in range(len(dataset)))


def _texts(inputs: list[str], tokenizer: Any, flag: str) -> Iterator[np.ndarray[Any, Any]]:
    layout = Layout()
    end = [] if tokenizer.eod is None else [tokenizer.eod]
    for shard in plan_shards(expand_inputs(inputs, flag), layout, _SHARD_BYTES):
        for document in ShardReader(shard, layout):
            if isinstance(document, Malformed):
                raise UserError(f"{shard.path}, line {document.line}: {document.reason}")
            yield np.array(tokenizer.tokenize(document) + end, dtype=np.int64)
