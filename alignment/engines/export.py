"""Export of a model during training as a Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alignment.ranks import raise_on_all_ranks
from megatron_ext.errors import UserError
from megatron_ext.hf.configs import save_config
from megatron_ext.hf.sources import Source
from megatron_ext.hf.tokenizer_export import export_tokenizer, match_exported_tokenizer

SHARD_BYTES = 10**9
"""Maximum size of the weights in one file, in bytes."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export(
    folder: Path,
    origin: Source | Path,
    tensors: Iterable[tuple[str, Tensor]],
    untie_head: bool = False,
) -> None:
    """Write a model as a Hugging Face folder; a collective of all ranks, which write in parallel.

    Args:
        folder: Folder to write, on a file system of all ranks. It replaces an existing one when it
            is complete.
        origin: Source from which the model was loaded, which has the configuration and tokenizer.
        tensors: Whole tensors under their Hugging Face names, on every rank. Besides one tensor, a
            rank has at most two files of `SHARD_BYTES` in memory.
        untie_head: Write an output layer that is tied to the embeddings as a separate tensor.

    Raises:
        UserError: The folder cannot be written, on all ranks.
    """
    rank = dist.get_rank()
    temporary = folder.with_name(f".{folder.name}.tmp")
    raise_on_all_ranks(lambda: _create(temporary) if rank == 0 else None)
    shards, embedding = _ShardWriter(temporary), None
    dtype: torch.dtype | None = None
    with shards:
        for name, tensor in tensors:  # a collective
            shards.add(name, tensor)
            dtype = tensor.dtype if "embed_tokens" in name or dtype is None else dtype
            embedding = tensor if name == _EMBEDDING and untie_head else embedding
        untied = embedding is not None and _HEAD not in shards.files
        if untied and embedding is not None:
            shards.add(_HEAD, embedding)
        raise_on_all_ranks(shards.finish)

    def complete() -> None:
        assert dtype is not None
        try:
            shards.write_index()
            _describe(temporary, origin, dtype)
            if untied:
                _change_config(temporary, tie_word_embeddings=False)
            _replace(folder, temporary)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}") from error

    raise_on_all_ranks(lambda: complete() if rank == 0 else None)


class _ShardWriter:
    """Writer of the weights: file number i is written by rank i modulo the number of ranks.

    A thread writes a file while the tensors of the next are gathered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, dict[str, int]()  # number of the file of each tensor
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._number = self._size = self._total = 0
        self._shard: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._problem: Exception | None = None

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, which must not change before `finish`."""
        bytes_ = tensor.numel() * tensor.element_size()
        if self._size and self._size + bytes_ > SHARD_BYTES:
            self._flush()
        self.files[name] = self._number
        self._size, self._total = self._size + bytes_, self._total + bytes_
        if self._number % self._ranks == self._rank:
            tensor = tensor.detach().cpu().contiguous()
            # Tensors of a file must not share memory.
            whole = tensor.untyped_storage().nbytes() == bytes_ and name != _HEAD
            self._shard[name] = tensor if whole else tensor.clone()

    def finish(self) -> None:
        """Wait until this rank's files are written.

        Raises:
            UserError: A file cannot be written.
        """
        self._flush()
        self._wait()
        if self._problem is not None:
            raise UserError(f"{self.folder} cannot be written: {self._problem}") from self._problem

    def write_index(self) -> None:
        """Rename the files of all ranks to the names that transformers reads; write the index."""
        count = self._number
        final = {n: f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)}
        for number, name in final.items():
            os.replace(self._path(number), self.folder / name)
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: final[number] for name, number in sorted(self.files.items())},
        }
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._shard:
            self._wait()
            path = self._path(self._number)
            self._written = self._pool.submit(save_file, self._shard, path, {"format": "pt"})
            self._shard = {}
        self._number, self._size = self._number + 1, 0

    def _wait(self) -> None:
        if self._written is None:
            return
        try:
            self._written.result()
        except (OSError, SafetensorError) as error:
            self._problem = self._problem or error
        self._written = None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def _create(folder: Path) -> None:
    """Make an empty folder.

    Raises:
        UserError: It cannot be made.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error


def _replace(folder: Path, new: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _describe(folder: Path, origin: Source | Path, dtype: torch.dtype) -> None:
    """Write the configuration and the tokenizer."""
    if isinstance(origin, Source) and origin.args is not None:
        special = export_tokenizer(origin.args, folder, origin.place)
        save_config(folder, origin.model, origin.family, dtype, special)
        match_exported_tokenizer(origin.args.tokenizer_model, folder)
        return
    place = origin.place if isinstance(origin, Source) else origin
    for file in place.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copy(file, folder)
    _change_config(folder, dtype=str(dtype).removeprefix("torch."))


def _change_config(folder: Path, **values: str | bool) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
