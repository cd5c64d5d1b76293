"""Megatron checkpoints from converted models: weights and thresholds without an optimizer."""

import re
from argparse import Namespace
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from torch import Tensor

from megatron_ext.arguments import parse_args
from megatron_ext.checkpoint import TRACKER
from megatron_ext.data.tokenizer_identity import tokenizer_digest
from megatron_ext.hf.architecture import Architecture, to_flags
from megatron_ext.hf.names import TensorLayout, TensorLink, join
from megatron_ext.hf.sources import Tensors
from megatron_ext.hf.torch_dist import TensorChunk, write_torch_dist

_NAME = "release"
"""Megatron's name for a checkpoint that does not belong to a training step."""


def release_arguments(
    model: Architecture, dtype: torch.dtype, tokenizer: list[str], final: Path
) -> Namespace:
    """Return the arguments that a training run of this model would save.

    Megatron's global arguments are set, which is possible once per process.

    Args:
        model: Architecture of the model.
        dtype: Data type of its weights.
        tokenizer: Flags of its tokenizer.
        final: Path to which the folder of checkpoints, with the tokenizer, will be moved.
    """
    precision = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(dtype, [])
    # Settings of the run itself, which a run that continues from the checkpoint sets again.
    run = ["--mock-data", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"]
    run += ["--et-warmup-iters", "0"] if model.thresholds else []
    args, _ = parse_args([*to_flags(model), *tokenizer, *precision, *run])
    args.hf_vocab_size = args.padded_vocab_size = model.vocab
    settle(args, final)
    return args


# Weight of a linear layer, or a part of one that Megatron saves in parts.
_LINEAR_WEIGHT = re.compile(r"(.+\.(?:linear_\w+|in_proj|out_proj))\.weight(?:\.\w+)?")


def settle(args: Namespace, final: Path) -> None:
    """Record in the arguments that the tokenizer is in `final` and that there is no optimizer."""
    args.tokenizer_sha256 = tokenizer_digest(args)
    if args.tokenizer_model is not None:
        args.tokenizer_model = str(final.absolute() / Path(args.tokenizer_model).name)
    args.no_save_optim = True
    args.iteration = 0


def chunk_of(
    link: TensorLink, model: Architecture, tensors: Tensors, rows: int, done: Callable[[int], None]
) -> TensorChunk:
    """Return a tensor of Megatron that is assembled from its parts when it is written.

    Args:
        link: Names and parts of the tensor.
        model: Architecture, for the shapes.
        tensors: Reader of the parts.
        rows: Rows of the vocabulary, with padding.
        done: Callback that receives the number of bytes of the parts.
    """

    def make() -> Tensor:
        parts = [tensors.read(name) for name, _ in link.parts]
        done(sum(part.nbytes for part in parts))
        return join(link, parts, model, rows)

    shape: tuple[int, ...] = link.shape
    if link.layout is TensorLayout.VOCABULARY:
        shape = (rows, *shape[1:])
    if link.expert is not None:
        shape = (model.experts, *shape)
    # Parts of several types, such as biases in fp32, become the type that torch gives their union.
    dtype = reduce(torch.promote_types, (tensors.dtypes[name] for name, _ in link.parts))
    return TensorChunk(link.key, shape, link.expert, dtype, make)


def write_release(folder: Path, chunks: list[TensorChunk], args: Namespace) -> None:
    """Write the one checkpoint of a folder of checkpoints.

    Args:
        folder: An existing folder, which may contain the tokenizer.
        chunks: All tensors; one entry per expert.
        args: Arguments that the checkpoint stores.
    """
    checkpoint = folder / _NAME
    checkpoint.mkdir()
    write_torch_dist(checkpoint, chunks, _objects(chunks, args))
    save_integrity_manifest(str(checkpoint))
    (folder / TRACKER).write_text(_NAME)


def _objects(chunks: list[TensorChunk], args: Namespace) -> dict[str, Any]:
    """Return what Megatron saves besides tensors: extra states of linear layers, common state."""
    objects: dict[str, Any] = {}
    for chunk in chunks:
        if linear := _LINEAR_WEIGHT.fullmatch(chunk.key):
            place = "0_1" if chunk.place is None else f"{chunk.place}_{chunk.shape[0]}"
            objects[f"{linear[1]}._extra_state/shard_{place}"] = None
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": True,
        },
    }
    return objects | {"common_state/shard_0_1": common}
