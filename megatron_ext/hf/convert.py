"""Conversion of checkpoints to Hugging Face folders and back, one tensor at a time.

Call `activate` of `megatron_ext.devices` before importing this module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.hf.configs import save_config
from megatron_ext.hf.gguf import GGUFModel
from megatron_ext.hf.gguf_source import open_gguf
from megatron_ext.hf.release import chunk_of, release_arguments, write_release
from megatron_ext.hf.safetensors_folder import PlannedTensor, write_safetensors
from megatron_ext.hf.sources import (
    AVERAGE,
    THRESHOLDS,
    UPDATES,
    Source,
    open_hf,
    open_megatron,
    thresholds_of,
)
from megatron_ext.hf.starting_recipe import write_recipe
from megatron_ext.hf.tokenizer_export import (
    copy_exported_tokenizer,
    export_tokenizer,
    match_exported_tokenizer,
)

SHARD_BYTES = 5 * 10**9

Done = Callable[[int], None]
"""Callback that receives the number of bytes of each tensor that has been written."""


@dataclass(frozen=True)
class Conversion:
    """Conversion that is complete except for its tensors.

    Attributes:
        bytes: Size of all tensors.
        write: Function that writes the tensors.
    """

    bytes: int
    write: Callable[[Done], None]


def to_hf(checkpoint: Path, folder: Path, tokenizer_model: str | None = None) -> Conversion:
    """Write a checkpoint as a Hugging Face folder, except for its tensors.

    Args:
        checkpoint: Folder of one iteration.
        folder: An existing, empty folder.
        tokenizer_model: File or folder of the tokenizer. Default: the one that training used.

    Raises:
        UserError: The checkpoint is damaged, or the model belongs to no supported family.
    """
    return as_hf(open_megatron(checkpoint, tokenizer_model), folder)


def as_hf(source: Source, folder: Path) -> Conversion:
    """Write any model as a Hugging Face folder; see `to_hf`."""
    tokenizer: Path | str | None
    model, tensors = source.model, source.tensors
    if source.args is None:
        tokenizer = source.place
        special = copy_exported_tokenizer(source.place, folder)
    else:
        tokenizer = source.args.tokenizer_model
        special = export_tokenizer(source.args, folder, source.place)
    save_config(folder, model, source.family, source.dtype, special)
    match_exported_tokenizer(tokenizer, folder)  # which depends on config.json
    plan: list[PlannedTensor] = []
    derived_tensors: dict[str, Callable[[], Tensor]] = {}
    for name, shape in (part for link in source.family.links(model) for part in link.parts):
        plan.append(PlannedTensor(name, shape, tensors.dtypes[name]))
        if name.endswith(AVERAGE):
            derived = PlannedTensor(name.replace(AVERAGE, THRESHOLDS), shape, torch.float32)
            derived_tensors[derived.name] = partial(thresholds_of, tensors, name, model)
            plan.append(derived)

    def read(name: str) -> Tensor:
        return derived_tensors[name]() if name in derived_tensors else tensors.read(name)

    return _hf_conversion(folder, plan, read)


def gguf_to_hf(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Conversion:
    """Write a GGUF file of a Llama model as a Hugging Face folder, except for its tensors.

    Args:
        file: The GGUF file.
        folder: An existing, empty folder.
        dtype: Data type of the tensors. Only fp32 represents quantized weights exactly.

    Raises:
        UserError: The file is damaged, or its architecture or tokenizer is not supported.
    """
    from megatron_ext.hf.gguf_tokenizer import save_tokenizer  # of an optional package

    source = open_gguf(file, dtype)
    special = save_tokenizer(GGUFModel(file), folder)
    save_config(folder, source.model, source.family, dtype, special)
    plan = [PlannedTensor(name, shape, dtype) for name, shape in source.tensors.shapes.items()]
    return _hf_conversion(folder, plan, source.tensors.read)


def _hf_conversion(
    folder: Path, plan: list[PlannedTensor], read: Callable[[str], Tensor]
) -> Conversion:
    def tensors() -> Iterator[Tensor]:
        return (read(entry.name) for entry in plan)

    def write(done: Done) -> None:
        write_safetensors(folder, plan, tensors(), SHARD_BYTES, done)

    return Conversion(sum(entry.bytes for entry in plan), write)


def to_megatron(
    source: Path, folder: Path, final: Path, dtype: torch.dtype = torch.float32
) -> Conversion:
    """Write a Hugging Face folder or GGUF file as a folder of checkpoints, except for its tensors.

    The checkpoint has no optimizer state. Megatron's global arguments are set, which is possible
    once per process.

    Args:
        source: Folder with config.json and safetensors files, or a GGUF file.
        folder: An existing, empty folder.
        final: Path to which the folder will be moved, which the checkpoint refers to.
        dtype: Data type of the tensors of a GGUF file.

    Raises:
        UserError: The source is incomplete, or its family is not supported.
    """
    opened = open_gguf(source, dtype) if source.is_file() else open_hf(source)
    return as_checkpoint(opened, folder, final)


def _has_thresholds(source: Source) -> bool:
    """Return whether the thresholds of a model have values, which those of a new model lack."""
    names = (name for name in source.tensors.shapes if name.endswith(UPDATES))
    return any(int(source.tensors.read(name)) for name in names)


def as_checkpoint(source: Source, folder: Path, final: Path) -> Conversion:
    """Write any model as a folder of checkpoints; see `to_megatron`."""
    model, tensors = source.model, source.tensors
    tokenizer = source.carry_tokenizer(folder)
    args = release_arguments(model, source.dtype, tokenizer, final)
    links = source.family.links(model)
    write_recipe(folder, model, source.dtype, tokenizer, str(source.place), _has_thresholds(source))

    def write(done: Done) -> None:
        rows = args.padded_vocab_size
        chunks = [chunk_of(link, model, tensors, rows, done) for link in links]
        write_release(folder, chunks, args)

    parts = (part for link in links for part in link.parts)
    total = sum(torch.Size(shape).numel() * tensors.dtypes[name].itemsize for name, shape in parts)
    return Conversion(total, write)
