"""Export of a model during training as a Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.hf.configs import save_config
from megatron_ext.hf.sources import Source
from megatron_ext.hf.tokenizer_export import export_tokenizer

SHARD_BYTES = 5 * 10**9
"""Maximum size of the weights in one file, in bytes."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def export(folder: Path, origin: Source | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a model as a Hugging Face folder on rank 0; a collective of all ranks.

    Args:
        folder: Folder to write. It replaces an existing one when it is complete.
        origin: Source from which the model was loaded, which has the configuration and tokenizer.
        tensors: Whole tensors under their Hugging Face names, on every rank. At most the tensors of
            one file are in memory.
    """
    writes = dist.get_rank() == 0
    temporary = folder.with_name(f".{folder.name}.tmp")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    names: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    files = size = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        nonlocal files, size
        if shard:
            files += 1
            save_file(shard, temporary / f"{files:05d}.safetensors", metadata={"format": "pt"})
            names.update(dict.fromkeys(shard, files))
            shard.clear()
            size = 0

    total = 0
    for name, tensor in tensors:  # a collective
        if writes:
            bytes_ = tensor.numel() * tensor.element_size()
            if size + bytes_ > SHARD_BYTES:
                flush()
            shard[name] = tensor.detach().cpu().contiguous().clone()
            size, total = size + bytes_, total + bytes_
            dtype = tensor.dtype if "embed_tokens" in name or dtype is None else dtype
    if writes:
        flush()
        assert dtype is not None
        _name_files(temporary, names, files, total)
        _describe(temporary, origin, dtype)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _name_files(folder: Path, names: dict[str, int], files: int, total: int) -> None:
    """Rename the files to the names that transformers reads, and write their index."""
    final = {number: f"model-{number:05d}-of-{files:05d}.safetensors" for number in names.values()}
    for number, name in final.items():
        os.replace(folder / f"{number:05d}.safetensors", folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[number] for name, number in sorted(names.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _describe(folder: Path, origin: Source | Path, dtype: torch.dtype) -> None:
    """Write the configuration and the tokenizer."""
    if isinstance(origin, Source) and origin.args is not None:
        special = export_tokenizer(origin.args, folder, origin.place)
        save_config(folder, origin.model, origin.family, dtype, special)
        return
    place = origin.place if isinstance(origin, Source) else origin
    for file in place.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
