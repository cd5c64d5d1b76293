"""Reading and writing of Megatron's torch_dist checkpoints, one tensor at a time.

torch's distributed checkpointing requires a complete state dict in memory. Here each tensor is read
on request, and created just before it is written.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megatron_ext.errors import UserError

FILE_BYTES = 5 * 10**9
"""Size from which a new file begins. Ranks that verify a checkpoint divide its files."""


class TorchDistReader:
    """Reader of the model's tensors in a checkpoint, by their names in Megatron with layer numbers.

    Megatron saves identical layers as one tensor with an additional dimension. Here each layer has
    its own name in any case.
    """

    def __init__(self, checkpoint: Path) -> None:
        reader = dcp.FileSystemReader(checkpoint)
        self._path, self._metadata = checkpoint, reader.read_metadata()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, tuple[str, int | None]] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, BytesStorageMetadata) or key.startswith("optimizer."):
                continue
            for name, layer in _layers_of(key, stored.size):
                self.shapes[name] = tuple(stored.size[0 if layer is None else 1 :])
                self.dtypes[name] = stored.properties.dtype
                self._stored[name] = key, layer

    def read(self, name: str, first: int | None = None) -> Tensor:
        """Return a tensor, or one slice of it.

        Args:
            name: Name of the tensor.
            first: Index along the first dimension; None for the whole tensor.

        Raises:
            UserError: Parts of the tensor are missing.
        """
        key, layer = self._stored[name]
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        places = [place for place in (layer, first) if place is not None]
        offsets = torch.Size([*places, *(0 for _ in stored.size[len(places) :])])
        sizes = torch.Size([*(1 for _ in places), *stored.size[len(places) :]])
        result: Tensor | None = None
        filled = 0
        for chunk in stored.chunks:
            item = _overlap(key, chunk, offsets, sizes)
            if item is None:
                continue
            part = narrow_tensor_by_index(self._load(item), item.storage_offsets, item.lengths)
            filled += part.numel()
            if part.shape == sizes:  # the usual case, without a copy
                result = part
                break
            if result is None:
                result = torch.empty(sizes, dtype=stored.properties.dtype)
            narrow_tensor_by_index(result, item.dest_offsets, item.lengths).copy_(part)
        if result is None or filled != result.numel():
            raise UserError(
                f"{self._path} is incomplete: parts of {name} are missing. Copy it again or use an "
                "earlier checkpoint."
            )
        return result.view(sizes[len(places) :])

    def _load(self, item: ReadItem) -> Tensor:
        info = self._metadata.storage_data[item.storage_index]
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{self._path} is compressed, which is not supported. Save the checkpoint without "
                "torch's stream transforms."
            )
        with (self._path / info.relative_path).open("rb") as stream:
            view: Any = _create_file_view(stream, info.offset, info.length)
            return torch.load(view, map_location="cpu", weights_only=True)


def _layers_of(key: str, size: torch.Size) -> Iterator[tuple[str, int | None]]:
    prefix = "decoder.layers."
    rest = key.removeprefix(prefix)
    if rest == key or rest[0].isdigit():
        yield key, None
    else:
        yield from ((f"{prefix}{layer}.{rest}", layer) for layer in range(size[0]))


def _overlap(
    key: str, chunk: ChunkStorageMetadata, offsets: torch.Size, sizes: torch.Size
) -> ReadItem | None:
    """Return the part of a stored chunk that overlaps with the requested box, or None."""
    begins = [max(a, b) for a, b in zip(chunk.offsets, offsets)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes)]
    if any(end <= begin for begin, end in zip(begins, ends)):
        return None
    index = MetadataIndex(key, chunk.offsets)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size(begin - offset for begin, offset in zip(begins, offsets)),
        storage_index=index,
        storage_offsets=torch.Size(b - offset for b, offset in zip(begins, chunk.offsets)),
        lengths=torch.Size(end - begin for begin, end in zip(begins, ends)),
    )


@dataclass(frozen=True)
class TensorChunk:
    """Tensor to be written, or one slice along the first dimension of a larger tensor.

    Attributes:
        key: Name in Megatron.
        shape: Shape of the whole tensor.
        place: Index of the slice along the first dimension, or None.
        dtype: Data type.
        make: Function that returns the tensor, or the slice without the first dimension.
    """

    key: str
    shape: tuple[int, ...]
    place: int | None
    dtype: torch.dtype
    make: Callable[[], Tensor]


class _LazyPlanner(SavePlanner):
    """Planner that creates each tensor just before it is written."""

    def __init__(self, chunks: list[TensorChunk], objects: dict[str, bytes]) -> None:
        self._chunks = {_index(chunk): chunk for chunk in chunks}
        self._objects = objects

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        items += [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(index.offset or torch.Size(()), _sizes(chunk)),
                    TensorProperties(dtype=chunk.dtype),
                    torch.Size(chunk.shape),
                ),
            )
            for index, chunk in self._chunks.items()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        chunk = self._chunks[write_item.index]
        return chunk.make().reshape(_sizes(chunk))


class _OneByOne(dcp.FileSystemWriter):
    """Writer that frees each tensor after writing it; torch's keeps all tensors of a file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        items, number = iter(plan.items), 0
        item = next(items, None)
        while item is not None:
            name = f"__0_{number}.distcp"
            with Path(self.path, name).open("wb") as stream:
                while item is not None and stream.tell() < FILE_BYTES:
                    begin = stream.tell()
                    _write(planner.resolve_data(item), stream)
                    length = stream.tell() - begin
                    place = _StorageInfo(name, begin, length)
                    results.append(WriteResult(item.index, length, place))
                    item = next(items, None)
                stream.flush()
                os.fsync(stream.fileno())
            number += 1
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _write(data: Tensor | io.BytesIO, stream: BinaryIO) -> None:
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
        return
    if data.untyped_storage().nbytes() != data.nbytes:
        data = data.clone()  # torch.save would write all of the storage
    torch.save(data, stream)


def _sizes(chunk: TensorChunk) -> torch.Size:
    return torch.Size(chunk.shape if chunk.place is None else (1, *chunk.shape[1:]))


def _index(chunk: TensorChunk) -> MetadataIndex:
    rest = (0,) * (len(chunk.shape) - 1)
    offset = (0,) * len(chunk.shape) if chunk.place is None else (chunk.place, *rest)
    return MetadataIndex(chunk.key, torch.Size(offset))


def write_torch_dist(folder: Path, chunks: list[TensorChunk], objects: dict[str, Any]) -> None:
    """Write a checkpoint that Megatron loads, except for the list of digests.

    Args:
        folder: An existing, empty folder of an iteration.
        chunks: The tensors.
        objects: Other objects that Megatron reads, by their names in the checkpoint.

    Raises:
        UserError: A tensor cannot be made.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    planner = _LazyPlanner(chunks, {name: _serialized(value) for name, value in objects.items()})
    writer = _OneByOne(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # which wraps the errors of making tensors
            causes = (cause for cause, _ in error.failures.values())
            raise next((c for c in causes if isinstance(c, UserError)), error) from None
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _serialized(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()
