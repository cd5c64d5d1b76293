"""Reader of Llama models in GGUF files, as llama.cpp writes them.

Tensor names come from gguf's own map. llama.cpp rotates neighboring channels of a head where
transformers rotates the two halves of it, so its converter permutes the rows of the query and key
projections, and this reader undoes the permutation. Files of other architectures are refused,
because each needs permutations, offsets or stacking that nothing here undoes.

transformers loads GGUF files too (`from_pretrained(folder, gguf_file=...)`). This reader exists
because of four differences, measured with transformers 5.23.0 on SmolLM2-135M-Instruct (Q4_1):

* Tokens: transformers does not know the pre-tokenizer `smollm` and silently splits text as GPT-2
  does. 1,098 of 11,625 texts got other token ids, wherever several spaces precede a digit. See
  `megatron_ext.hf.gguf_tokenizer`.
* Checks: transformers loads a `llama` file with experts, with YaRN scaling or with partial rotation
  as a plain Llama model, and initializes missing tensors at random. This reader raises an error.
* End tokens: transformers reads `eos` only, so that a chat model whose turns end at `eot` or `eom`
  does not stop there.
* Memory: loading took 813 MB on top of the imports, because the whole model is in memory. The
  whole conversion here, one tensor at a time, takes 424 MB.

All 272 weights and the chat template are the same, bit for bit.
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
_ALTERNATIVE = "Convert the Hugging Face folder of the model instead, with --from hf."


class GGUFModel:
    """Model in a GGUF file: its architecture, its metadata, and its tensors by transformers' names.

    Attributes:
        architecture: Sizes and options of the model.
        shapes: Shape of each tensor, by its name in transformers. A tensor without a counterpart
            there keeps its name in the file.
    """

    def __init__(self, file: Path) -> None:
        """Read the metadata and the list of tensors, but no tensor.

        Args:
            file: The GGUF file.

        Raises:
            UserError: The file is damaged, incomplete, or of an unsupported architecture.
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
        """Return an entry of the metadata, in Python's types.

        Args:
            key: Name of the entry.
            default: Value of a missing entry. None makes the entry mandatory.

        Raises:
            UserError: A mandatory entry is missing.
        """
        if key in self._fields:
            return self._fields[key].contents()
        if default is None:
            raise UserError(
                f"{self._file} has no {key} in its metadata, so it does not describe a complete "
                "model. Download the file again, or convert the model to GGUF again."
            )
        return default

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized to fp32, its rows in the order of transformers."""
        from gguf import dequantize

        stored = self._sources[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self._file} has the tensor {name} in the quantization "
                f"{stored.tensor_type.name}, which the package gguf cannot dequantize. Use a file "
                "with another quantization of the model, such as Q8_0 or F16."
            ) from error
        # An unquantized tensor is a view of the file, which torch must not write to.
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
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
                f"{self._file} holds a model of architecture {kind}. Only GGUF files of "
                f"architecture {_KNOWN} can be converted. {_ALTERNATIVE}"
            )
        sizes = {ours: self.get(f"{kind}.{theirs}") for theirs, ours in _SIZES.items()}
        if experts := self.get(f"{kind}.expert_count", 0):
            raise UserError(
                f"{self._file} has {experts} experts. Only dense GGUF models can be converted. "
                f"{_ALTERNATIVE}"
            )
        if (scaling := self.get(f"{kind}.rope.scaling.type", "none")) != "none":
            raise UserError(
                f"{self._file} has RoPE scaling {scaling}. Only GGUF models with plain RoPE can be "
                f"converted. {_ALTERNATIVE}"
            )
        head_dim = self.get(f"{kind}.attention.key_length", sizes["hidden"] // sizes["heads"])
        if (rotated := self.get(f"{kind}.rope.dimension_count", head_dim)) != head_dim:
            raise UserError(
                f"{self._file} rotates {rotated} of {head_dim} channels of a head. A Llama model "
                f"rotates all of them. {_ALTERNATIVE}"
            )
        base = self.get(f"{kind}.rope.freq_base", 10000.0)
        if base != int(base):
            raise UserError(
                f"{self._file} has a RoPE base of {base}, but Megatron's --rotary-base is an "
                "integer, so the model cannot be converted."
            )
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
        raise UserError(
            f"{self._file} has no tensor {name}, so it does not hold a complete model. Download "
            "the file again, or convert the model to GGUF again."
        )

    def _matches(self) -> Iterator[tuple[str, Any]]:
        """Yield all tensors with their names in transformers."""
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
    """Return the metadata and tensors of a file; the file is memory-mapped."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf, which is not installed. Install it with "
            "pip install 'megatron-et[gguf]'."
        ) from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UserError(
                f"{file} uses a quantization that the installed package gguf does not know "
                f"({error}). Use a file with another quantization of the model, such as Q8_0 or "
                "F16, or a newer gguf."
            ) from error
        raise UserError(
            f"{file} is not a GGUF file or is incomplete ({error}). Download the file again."
        ) from error
    return dict(reader.fields), list(reader.tensors)
