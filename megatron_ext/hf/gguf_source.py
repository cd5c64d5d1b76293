"""GGUF files as a source of checkpoints, with their tokenizer."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from megatron_ext.hf.families import family_named
from megatron_ext.hf.gguf import GGUFModel
from megatron_ext.hf.sources import FiniteTensors, Source, check_tensors


class GGUFTensors:
    """Reader of a GGUF file's tensors, dequantized, in one data type."""

    def __init__(
        self, model: GGUFModel, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self._model, self.shapes = model, shapes
        self.dtypes = dict.fromkeys(shapes, dtype)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._model.read(name).to(self.dtypes[name])


def open_gguf(file: Path, dtype: torch.dtype = torch.float32) -> Source:
    """Open a GGUF file of a Llama model.

    Args:
        file: The GGUF file.
        dtype: Data type of the tensors. Only fp32 represents quantized weights exactly.

    Raises:
        UserError: The file is damaged or incomplete, or its architecture is not supported.
    """
    model, family = GGUFModel(file), family_named("llama")
    parts = {name: s for link in family.links(model.architecture) for name, s in link.parts}
    check_tensors(file, parts, model.shapes)
    tensors = FiniteTensors(file, GGUFTensors(model, parts, dtype))
    return Source(file, model.architecture, family, tensors, partial(_carry_tokenizer, model))


def _carry_tokenizer(model: GGUFModel, folder: Path) -> list[str]:
    """Write the tokenizer of a GGUF file into a folder; return the flags for it."""
    from megatron_ext.hf.gguf_tokenizer import save_tokenizer  # of an optional package

    target = folder / "tokenizer"
    target.mkdir()
    special = save_tokenizer(model, target)
    GenerationConfig(**special).save_pretrained(target)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(target)]
