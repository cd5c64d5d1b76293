"""Models to convert, whatever they are stored in: tensors by the names of a family, one at a time.

Every tensor is accounted for when a model is opened: what is missing, left over or of another shape
is an error.
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

from megatron_ext.checkpoint import damage, find_checkpoint, read_common_state
from megatron_ext.data.tokenizer_identity import check_tokenizer_content
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, from_args
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import OWN, Family, family_named, family_of, read_config
from megatron_ext.hf.names import TensorLayout, TensorLink, split
from megatron_ext.hf.safetensors_folder import SafetensorsReader
from megatron_ext.hf.tokenizer_export import carry_tokenizer, import_tokenizer
from megatron_ext.hf.torch_dist import TorchDistReader
from megatron_ext.moe.thresholds import Thresholds

# Older folders hold them for each layer. transformers ignores them by this pattern, for every model
# that computes them, whatever their values.
_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
AVERAGE, UPDATES, THRESHOLDS = (
    f".gate.{name}" for name in ("threshold_average", "threshold_updates", "thresholds")
)


class Tensors(Protocol):
    """Tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """One tensor."""


@dataclass(frozen=True)
class Source:
    """A model that is ready to be read.

    Attributes:
        family: whose names its tensors have.
        carry_tokenizer: puts its tokenizer into a folder; gives the flags of `pretrain_et.py`.
        args: of the run that trained it, where one did.
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
        UserError: It is incomplete, of no family known here, or has tensors that the model does
            not compute with.
    """
    config = load_config(folder)
    family, model = family_named(config.model_type), read_config(config)
    if reason := family.misfit(model):
        raise UserError(f"{folder} is no {family.name} model that can be converted: {reason}")
    reader = SafetensorsReader(folder)
    expected = {name: shape for link in family.links(model) for name, shape in link.parts}
    expected |= {
        n.replace(AVERAGE, THRESHOLDS): shape for n, shape in expected.items() if AVERAGE in n
    }
    derived = _derived_tensors(folder, model, reader)
    account(folder, expected, {n: s for n, s in reader.shapes.items() if n not in derived})
    for name in (name for name in expected if name.endswith(AVERAGE)):
        thresholds = name.replace(AVERAGE, THRESHOLDS)
        if not torch.equal(thresholds_of(reader, name, model), reader.read(thresholds)):
            raise UserError(
                f"{folder}: {thresholds} is not what {name} gives, so training could not resume "
                "from it: change both"
            )
    return Source(folder, model, family, reader, partial(import_tokenizer, folder, model.vocab))


def _derived_tensors(folder: Path, model: Architecture, reader: SafetensorsReader) -> set[str]:
    """Return the names of tensors that transformers ignores: frequencies of positions, which it
    computes from the configuration, and the output layer of a model whose configuration ties it to
    the embedding.

    Raises:
        UserError: That output layer is not the embedding.
    """
    names = {name for name in reader.shapes if _FREQUENCIES.search(name)}
    if not model.tied or _OUTPUT not in reader.shapes:
        return names
    if not torch.equal(reader.read(_OUTPUT), reader.read(_EMBEDDING)):
        raise UserError(
            f"{folder}: {_OUTPUT} is not {_EMBEDDING}, though config.json has tie_word_embeddings: "
            "set it to false, or remove the tensor"
        )
    return names | {_OUTPUT}


def open_megatron(
    checkpoint: Path, tokenizer_model: str | None = None, family: Family | None = None
) -> Source:
    """A checkpoint of one iteration.

    Args:
        checkpoint: its folder.
        tokenizer_model: where the tokenizer's file is, if not where it was in training.
        family: whose names its tensors get. Default: the one that such a model belongs to.

    Raises:
        UserError: it is damaged, the tokenizer is not that of its training, or no family known here
            has such models.
    """
    if problem := damage(checkpoint):
        raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")
    args = read_common_state(checkpoint)["args"]
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    check_tokenizer_content(checkpoint, args)
    reader = TorchDistReader(checkpoint)
    model = _with_rows(from_args(args), args, reader)
    family = family or family_of(model)
    links = family.links(model)
    _account_megatron(checkpoint, links, model, reader)
    tensors = _MegatronTensors(reader, links, model)
    carry = partial(carry_tokenizer, args, checkpoint=checkpoint)
    return Source(checkpoint, model, family, tensors, carry, args)


def open_dense(path: Path) -> Source:
    """A model without experts; its tensors have the names that Expert Threshold models have.

    Args:
        path: a Hugging Face folder, a run directory, or a folder of checkpoints.

    Raises:
        UserError: it cannot be read, or has experts.
    """
    hf = (path / "config.json").is_file()
    source = open_hf(path) if hf else open_megatron(find_checkpoint(path), family=OWN)
    if source.model.router is not None:
        raise UserError(f"{source.place} has experts already: only a dense model can be upcycled")
    return source


def thresholds_of(tensors: Tensors, average: str, model: Architecture) -> Tensor:
    """The thresholds, fp32 `[experts]`, of the layer whose moving average has this name."""
    updates = tensors.read(average.replace(AVERAGE, UPDATES))
    if not int(updates):
        raise UserError(
            "the thresholds have no value yet: train for at least one step, or calibrate them "
            "with tools.calibrate_thresholds, first"
        )
    state = Thresholds(model.experts, model.ema_decay, device="cpu")
    state.load_state_dict({"average": tensors.read(average), "updates": updates})
    return state.value()


def account(place: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise for the first tensor that is missing, left over or of another shape."""
    if _EMBEDDING in expected.keys() - found.keys():
        for name in found:
            if name.endswith("embed_tokens.weight"):
                raise UserError(
                    f"{place} has a tensor {name} where {_EMBEDDING} is expected: save the model "
                    "as the class for causal language models that config.json belongs to"
                )
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{place} has no tensor {name}, which a model of its configuration needs")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{place} has a tensor {name}, which no model of its configuration has")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{place}: {name} has shape {found[name]} where {shape} is expected")


class _MegatronTensors:
    """A checkpoint's tensors, in the parts that they have on the other side."""

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
        link, place = self._places[name]
        if self._last is None or self._last[0] is not link:
            self._last = None  # before there are two
            whole = self._reader.read(link.key, link.expert)
            self._last = link, split(link, whole, self._model)
        return self._last[1][place]


def _with_rows(model: Architecture, args: Namespace, reader: TorchDistReader) -> Architecture:
    """Keep the rows beyond the tokenizer's that a model brought from Hugging Face."""
    rows = getattr(args, "hf_vocab_size", None)
    embedding = reader.shapes.get("embedding.word_embeddings.weight", (0,))
    if rows is None or rows > embedding[0]:
        return model
    return replace(model, vocab=rows)


def _account_megatron(
    checkpoint: Path, links: list[TensorLink], model: Architecture, reader: TorchDistReader
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for link in links:
        stacked = () if link.expert is None else (model.experts,)
        expected[link.key] = (*stacked, *link.shape)
    vocabulary = {link.key for link in links if link.layout is TensorLayout.VOCABULARY}
    found = dict(reader.shapes)
    for key in vocabulary & found.keys():
        if found[key][0] >= model.vocab:
            found[key] = (model.vocab, *found[key][1:])  # the rest is padding
    account(checkpoint, expected, found)
