"""Reading and writing of a folder of safetensors files, one tensor at a time."""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.errors import UserError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SafetensorsReader:
    """Tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        """Read shapes and dtypes.

        Raises:
            UserError: A file is missing or damaged, or a data type is not supported.
        """
        self._files = _files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in sorted(set(self._files.values())):
            names = [name for name, holder in self._files.items() if holder == file]
            with _opened(file) as tensors:
                present = set(tensors.keys())
                for name in sorted(present.symmetric_difference(names)):
                    place = "the file, not in the index" if name in present else "the index"
                    raise UserError(
                        f"{file} is incomplete: {name} is only in {place}. Copy the folder again."
                    )
                for name in names:
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise UserError(
                            f"{file} has {name} in data type {part.get_dtype()}, which cannot be "
                            f"converted. Save the model in one of {', '.join(_DTYPES)}."
                        )
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged ({error}). Copy it again.") from error


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        UserError: There are no safetensors files, or it is ambiguous which belong to the model.
    """
    index, single = folder / INDEX, folder / _SINGLE
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = {name: folder / file for name, file in places.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged. Copy it again.") from error
        if single.is_file() and single not in files.values():
            raise UserError(
                f"{folder} has both {_SINGLE} and {INDEX}. Remove the one that is outdated."
            )
        return files
    if single.is_file():
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    raise UserError(
        f"{folder} has neither {INDEX} nor {_SINGLE}. Save the model in safetensors files."
    )


@dataclass(frozen=True)
class PlannedTensor:
    """Name, shape and data type of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    plan: list[PlannedTensor],
    tensors: Iterable[Tensor],
    shard_bytes: int,
    done: Callable[[int], None],
) -> None:
    """Write tensors one by one into files of at most `shard_bytes`, and their index.

    safetensors' own writer requires all tensors of a file in memory.

    Args:
        folder: An existing folder.
        plan: Names, shapes and data types.
        tensors: The tensors, in the order of the plan.
        shard_bytes: Maximum size of a file, unless one tensor is larger.
        done: Callback that receives the number of bytes of each tensor written.
    """
    shards: list[list[PlannedTensor]] = [[]]
    for entry in plan:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    remaining, places = iter(tensors), {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as stream:
            stream.write(_header(shard))
            for entry in shard:
                tensor = next(remaining)
                assert tensor.shape == entry.shape and tensor.dtype == entry.dtype, entry.name
                raw = tensor.contiguous().view(-1).view(torch.uint8)
                stream.write(memoryview(raw.numpy()))
                places[entry.name] = file.name
                done(entry.bytes)
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in plan)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: list[PlannedTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in shard:
        end = begin + entry.bytes
        shape = list(entry.shape)
        entries[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
