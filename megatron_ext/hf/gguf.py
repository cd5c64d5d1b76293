"""Llama models in GGUF files, as llama.cpp writes them: dequantised tensors and sizes.

Names come from gguf's own map. llama.cpp rotates neighbouring channels of a head where transformers
rotates the two halves of it, so its converter permutes the rows of the query and key projections;
here that is undone. Other architectures are permuted, shifted or stacked in ways of their own and
are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture
from megatron_ext.hf.families import family_named

_SIZES = {
    "block_count": "layers",
    "embedding_length": "hidden",
    "attention.head_count": "heads",
    "feed_forward_length": "ffn",
    "context_length": "max_length",
}
_KNOWN = "llama"


class GGUFModel:
    """A model in one file: its architecture, its metadata, and its tensors by transformers' names.

    Attributes:
        architecture: sizes.
        shapes: of each tensor, by name. One without a counterpart keeps its own name.
    """

    def __init__(self, file: Path) -> None:
        """Read what comes before the tensors.

        Raises:
            UserError: the file is damaged, incomplete, or of an architecture not known here.
        """
        self._file = file
        self._fields, self._stored = _opened(file)
        self.architecture = self._read_architecture()
        self._sources = dict(self._matches())
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._sources.items()
        }

    def get(self, key: str, default: Any = None) -> Any:
        """An entry of the metadata, in Python's types.

        Raises:
            UserError: it is not there and there is no default.
        """
        if key in self._fields:
            return self._fields[key].contents()
        if default is None:
            raise UserError(f"{self._file} has no {key} in its metadata: it is no whole model")
        return default

    def read(self, name: str) -> Tensor:
        """A tensor in fp32, its rows in transformers' order."""
        from gguf import dequantize

        stored = self._sources[name]
        try:
            whole = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{self._file}: {name} cannot be read: {error}") from error
        # What is not quantised is a view of the file, which torch must not write to.
        tensor = torch.from_numpy(whole if whole.flags.writeable else whole.copy())
        tensor = tensor.view(self.shapes[name])
        model = self.architecture
        heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(name.split(".")[-2])
        if heads is None:
            return tensor
        pairs = tensor.view(heads, model.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def _read_architecture(self) -> Architecture:
        kind = self.get("general.architecture")
        if kind != _KNOWN:
            raise UserError(
                f"{self._file} holds a model of architecture {kind}: of GGUF files only those of "
                f"{_KNOWN} can be converted"
            )
        sizes = {ours: self.get(f"{kind}.{theirs}") for theirs, ours in _SIZES.items()}
        if experts := self.get(f"{kind}.expert_count", 0):
            raise UserError(f"{self._file} has {experts} experts: only dense models are converted")
        if (scaling := self.get(f"{kind}.rope.scaling.type", "none")) != "none":
            raise UserError(
                f"{self._file} has RoPE scaling {scaling}: only plain RoPE is converted"
            )
        head_dim = self.get(f"{kind}.attention.key_length", sizes["hidden"] // sizes["heads"])
        if (rotated := self.get(f"{kind}.rope.dimension_count", head_dim)) != head_dim:
            raise UserError(
                f"{self._file} rotates {rotated} of {head_dim} channels: all are in a Llama model"
            )
        base = self.get(f"{kind}.rope.freq_base", 10000.0)
        if base != int(base):
            raise UserError(f"{self._file} has a RoPE base of {base}, which is no whole number")
        eps = torch.tensor(self.get(f"{kind}.attention.layer_norm_rms_epsilon")).numpy()
        return Architecture(
            **sizes,
            kv_heads=self.get(f"{kind}.attention.head_count_kv", sizes["heads"]),
            head_dim=head_dim,
            vocab=int(self._tensor("token_embd.weight").shape[1]),
            eps=float(str(eps)),  # the shortest number that fp32 stores as this
            rope_base=int(base),
            tied=all(tensor.name != "output.weight" for tensor in self._stored),
        )

    def _tensor(self, name: str) -> Any:
        for tensor in self._stored:
            if tensor.name == name:
                return tensor
        raise UserError(f"{self._file} has no tensor {name}: it is no whole model")

    def _matches(self) -> Iterator[tuple[str, Any]]:
        """Tensors with their names in transformers."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH.LLAMA, self.architecture.layers)
        links = family_named(_KNOWN).links(self.architecture)
        theirs = {
            names.get_name(ours, try_suffixes=(".weight",)): ours
            for link in links
            for ours, _ in link.parts
        }
        for tensor in self._stored:
            yield theirs.get(tensor.name, tensor.name), tensor


def _opened(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """Metadata and tensors of a file, which stays mapped and is read where it is looked at."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf: pip install 'megatron-et[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(
            f"{file} is no GGUF file or an incomplete one ({error}): copy it again"
        ) from error
    return dict(reader.fields), list(reader.tensors)
