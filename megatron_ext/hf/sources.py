"""Uniform access to models in any format: tensors by the names of a family, one at a time.

Opening a model checks every tensor: one that is missing, unexpected or of another shape is an
error.
"""

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.checkpoint import damage, read_common_state
from megatron_ext.data.run_tokenizer import locate_tokenizer
from megatron_ext.data.tokenizer_identity import check_tokenizer_content
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, from_args
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import OWN, Family, family_named, family_of, read_config
from megatron_ext.hf.names import TensorLayout, TensorLink, split
from megatron_ext.hf.safetensors_folder import SafetensorsReader
from megatron_ext.hf.tokenizer_export import carry_tokenizer, import_tokenizer
from megatron_ext.hf.torch_dist import TorchDistReader
from megatron_ext.model_location import locate_model
from megatron_ext.moe.thresholds import FILTER, Thresholds

# Older folders contain the frequencies of each layer. transformers computes them from the
# configuration and ignores tensors with this pattern, whatever their values.
_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
AVERAGE, UPDATES, THRESHOLDS = (
    f".gate.{name}" for name in ("threshold_average", "threshold_updates", "thresholds")
)


class Tensors(Protocol):
    """Reader of tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""


class FiniteTensors:
    """Reader of a model's tensors that refuses weights that are not finite.

    Thresholds are exempt, of which an infinite one turns an expert off.
    """

    def __init__(self, place: Path, tensors: Tensors) -> None:
        """Wrap a reader.

        Args:
            place: File or folder of the model, for error messages.
            tensors: Reader of the tensors.
        """
        self._place, self._tensors = place, tensors
        self.shapes, self.dtypes = tensors.shapes, tensors.dtypes

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            UserError: A weight is not finite.
        """
        tensor = self._tensors.read(name)
        if ".gate.threshold" not in name:
            check_finite(self._place, name, tensor)
        return tensor


def check_finite(place: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a value that is not finite.

    Args:
        place: File or folder of the model, for the error message.
        name: Name of the tensor.
        tensor: The tensor.

    Raises:
        UserError: A value is not finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    ends = torch.stack(tensor.aminmax())  # one pass without a copy; NaN in any place gives NaN
    if not ends.isfinite().all():
        raise UserError(
            f"{place} has a value in {name} that is not finite, so the model cannot compute. Copy "
            "the model again, or use an earlier checkpoint."
        )


@dataclass(frozen=True)
class Source:
    """Model that is ready to be read.

    Attributes:
        place: File or folder of the model.
        model: Architecture.
        family: Family whose names the tensors have.
        tensors: Reader of the tensors.
        carry_tokenizer: Function that copies the tokenizer into a folder and returns the flags of
            `pretrain_et.py` for it.
        args: Arguments of the run that trained the model; None if there is no such run.
    """

    place: Path
    model: Architecture
    family: Family
    tensors: Tensors
    carry_tokenizer: Callable[[Path], list[str]]
    args: Namespace | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.tensors.dtypes[_EMBEDDING]


def open_hf(folder: Path) -> Source:
    """Open a Hugging Face folder.

    Raises:
        UserError: The folder is incomplete, its family is not supported, or it has tensors that
            the model does not use.
    """
    config = load_config(folder)
    family, model = family_named(config.model_type), read_config(config)
    if reason := family.misfit(model):
        raise UserError(
            f"{folder} is not a {family.name} model that can be converted: {reason}. Correct "
            "config.json or choose another model."
        )
    reader = SafetensorsReader(folder)
    expected = {name: shape for link in family.links(model) for name, shape in link.parts}
    expected |= {
        n.replace(AVERAGE, THRESHOLDS): shape for n, shape in expected.items() if AVERAGE in n
    }
    derived = _derived_tensors(folder, model, reader)
    check_tensors(folder, expected, {n: s for n, s in reader.shapes.items() if n not in derived})
    for name in (name for name in expected if name.endswith(AVERAGE)):
        thresholds = name.replace(AVERAGE, THRESHOLDS)
        if not torch.equal(thresholds_of(reader, name, model), reader.read(thresholds)):
            raise UserError(
                f"{folder} has values in {thresholds} that do not follow from {name}, so training "
                "could not resume from it. Change both tensors together."
            )
    tensors = FiniteTensors(folder, reader)
    return Source(folder, model, family, tensors, partial(import_tokenizer, folder, model.vocab))


def _derived_tensors(folder: Path, model: Architecture, reader: SafetensorsReader) -> set[str]:
    """Return the names of tensors that transformers ignores.

    These are the frequencies of positions, which it computes from the configuration, and the output
    layer of a model whose configuration ties it to the embedding.

    Raises:
        UserError: The output layer differs from the embedding.
    """
    names = {name for name in reader.shapes if _FREQUENCIES.search(name)}
    if not model.tied or _OUTPUT not in reader.shapes:
        return names
    if not torch.equal(reader.read(_OUTPUT), reader.read(_EMBEDDING)):
        raise UserError(
            f"In {folder}, {_OUTPUT} is not {_EMBEDDING}, though config.json has "
            "tie_word_embeddings. Set it to false, or remove the tensor."
        )
    return names | {_OUTPUT}


def open_megatron(
    checkpoint: Path, tokenizer_model: str | None = None, family: Family | None = None
) -> Source:
    """Open a checkpoint of one iteration.

    Args:
        checkpoint: Folder of the iteration.
        tokenizer_model: File or folder of the tokenizer. Default: the one that training used.
        family: Family whose tensor names are used. Default: the family of the architecture.

    Raises:
        UserError: The checkpoint is damaged, the tokenizer is not the one that training used, or
            the model belongs to no supported family.
    """
    if problem := damage(checkpoint):
        raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")
    args = read_common_state(checkpoint)["args"]
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
        check_tokenizer_content(checkpoint, args)
    else:
        locate_tokenizer(args, checkpoint)
    reader = TorchDistReader(checkpoint)
    model = with_rows(from_args(args), args, reader)
    family = family or family_of(model)
    links = family.links(model)
    _check_megatron_tensors(checkpoint, links, model, reader)
    tensors = FiniteTensors(checkpoint, _MegatronTensors(reader, links, model))
    carry = partial(carry_tokenizer, args, checkpoint=checkpoint)
    return Source(checkpoint, model, family, tensors, carry, args)


def open_model(path: Path, flag: str = "--load", family: Family | None = None) -> Source:
    """Open a model in any folder that this project writes; see `locate_model`.

    Args:
        path: Hugging Face folder, run directory, or folder of checkpoints.
        flag: Flag that has the path, for messages.
        family: Family whose tensor names a checkpoint gets. Default: that of its architecture.

    Raises:
        UserError: There is no model, or it cannot be read.
    """
    location = locate_model(path, flag)
    if location.kind == "hf":
        return open_hf(location.folder)
    return open_megatron(location.folder, family=family)


def open_dense(path: Path) -> Source:
    """Open a model without experts, with the tensor names of Expert Threshold models.

    Args:
        path: Hugging Face folder, GGUF file, run directory, or folder of checkpoints.

    Raises:
        UserError: The model cannot be read, or has experts.
    """
    if path.is_file():
        from megatron_ext.hf.gguf_source import open_gguf  # which imports this module

        source = open_gguf(path)
    else:
        source = open_model(path, family=OWN)
    if source.model.router is not None:
        raise UserError(
            f"{source.place} has experts already. Only dense models can be upcycled. Choose a "
            "model without experts."
        )
    return source


def thresholds_of(tensors: Tensors, average: str, model: Architecture) -> Tensor:
    """Compute the thresholds of a layer from the state of their moving average.

    Args:
        tensors: Reader of the model's tensors.
        average: Name of the layer's moving average.
        model: Architecture.

    Returns:
        Thresholds, fp32 `[experts]`.

    Raises:
        UserError: The thresholds have never been updated.
    """
    updates = tensors.read(average.replace(AVERAGE, UPDATES))
    if not int(updates):
        raise UserError(
            "The thresholds of the model have no value yet. Train it for at least one step, or set "
            "them with tools.calibrate_thresholds."
        )
    state = Thresholds(model.experts, model.ema_decay, device="cpu")
    state.load_state_dict({"average": tensors.read(average), "updates": updates})
    return state.value()


def check_tensors(place: Path, expected: dict[str, Any], present: dict[str, Any]) -> None:
    """Check that a model has exactly the expected tensors.

    Args:
        place: File or folder of the model, for error messages.
        expected: Shapes by name.
        present: Shapes of the model's tensors by name.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape.
    """
    if _EMBEDDING in expected.keys() - present.keys():
        for name in present:
            if name.endswith("embed_tokens.weight"):
                raise UserError(
                    f"{place} has a tensor {name} where {_EMBEDDING} is expected. Save the model "
                    "with the class for causal language models of its config.json."
                )
    for name in sorted(expected.keys() - present.keys()):
        raise UserError(
            f"{place} has no tensor {name}, which a model of its configuration needs. Copy the "
            "model again or correct its configuration."
        )
    for name in sorted(present.keys() - expected.keys()):
        raise UserError(
            f"{place} has a tensor {name}, which no model of its configuration has. Remove the "
            "tensor or correct the configuration."
        )
    for name, shape in expected.items():
        if present[name] != shape:
            raise UserError(
                f"In {place}, {name} has shape {present[name]} where {shape} is expected. Correct "
                "the configuration or copy the model again."
            )


class _MegatronTensors:
    """Reader of a checkpoint's tensors by their Hugging Face names."""

    def __init__(
        self, reader: TorchDistReader, links: list[TensorLink], model: Architecture
    ) -> None:
        self._reader, self._model = reader, model
        self._places = {
            name: (link, place) for link in links for place, (name, _) in enumerate(link.parts)
        }
        self.shapes = {name: shape for link in links for name, shape in link.parts}
        self.dtypes = {name: reader.dtypes[link.key] for name, (link, _) in self._places.items()}
        self._last: tuple[TensorLink, list[Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        link, place = self._places[name]
        if self._last is None or self._last[0] is not link:
            self._last = None  # so that memory never contains two tensors
            tensor = self._reader.read(link.key, link.expert)
            self._last = link, split(link, tensor, self._model)
        return self._last[1][place]


def with_rows(model: Architecture, args: Namespace, reader: TorchDistReader) -> Architecture:
    """Add the embedding rows beyond the tokenizer that a model from Hugging Face has."""
    rows = getattr(args, "hf_vocab_size", None)
    embedding = reader.shapes.get("embedding.word_embeddings.weight", (0,))
    if rows is None or rows > embedding[0]:
        return model
    return replace(model, vocab=rows)


def _check_megatron_tensors(
    checkpoint: Path, links: list[TensorLink], model: Architecture, reader: TorchDistReader
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for link in links:
        stacked = () if link.expert is None else (model.experts,)
        expected[link.key] = (*stacked, *link.shape)
    vocabulary = {link.key for link in links if link.layout is TensorLayout.VOCABULARY}
    left_out = {key for key in reader.shapes if key.endswith(FILTER) or key.startswith("mtp.")}
    present = {key: shape for key, shape in reader.shapes.items() if key not in left_out}
    for key in vocabulary & present.keys():
        if present[key][0] >= model.vocab:
            present[key] = (model.vocab, *present[key][1:])  # the rest is padding
    check_tensors(checkpoint, expected, present)
