"""Checkpoints of this project to Hugging Face folders and back, a tensor at a time.

Every tensor of either side is accounted for before anything is written: what is missing, left over
or of another shape is an error. `activate` of `megatron_ext.devices` must have been called.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from torch import Tensor

from megatron_ext.arguments import parse_args
from megatron_ext.checkpoint import TRACKER, damage, read_common_state
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, from_args, to_flags
from megatron_ext.hf.configs import load_config, save_config
from megatron_ext.hf.families import family_named, family_of, read_config
from megatron_ext.hf.gguf import GGUFModel
from megatron_ext.hf.names import Layout, Link, join, split
from megatron_ext.hf.safetensors_folder import Planned, SafetensorsReader, write_safetensors
from megatron_ext.hf.tokenizers import export_tokenizer, import_tokenizer
from megatron_ext.hf.torch_dist import Chunk, TorchDistReader, write_torch_dist
from megatron_ext.moe.thresholds import Thresholds
from megatron_ext.training.checks import sha256

SHARD_BYTES = 5 * 10**9
_AVERAGE, _THRESHOLDS = ".gate.threshold_average", ".gate.thresholds"
# A name that Megatron gives to what is not a step of training; such a checkpoint has no optimizer.
_RELEASE = "release"

Done = Callable[[int], None]
"""Told the bytes of each tensor written."""


@dataclass(frozen=True)
class Conversion:
    """What is ready to be written.

    Attributes:
        bytes: of all tensors.
        write: writes them.
    """

    bytes: int
    write: Callable[[Done], None]


def to_hf(checkpoint: Path, folder: Path, tokenizer_model: str | None = None) -> Conversion:
    """Write a checkpoint as a Hugging Face folder, all but its tensors.

    Args:
        checkpoint: of one iteration.
        folder: must be there and empty.
        tokenizer_model: where the tokenizer's file is, if not where it was in training.

    Raises:
        UserError: the checkpoint is damaged, or no family known here has such models.
    """
    if problem := damage(checkpoint):
        raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")
    args = read_common_state(checkpoint)["args"]
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    model = from_args(args)
    reader = TorchDistReader(checkpoint)
    model = _with_rows(model, args, reader)
    family = family_of(model)
    links = family.links(model)
    _account_megatron(checkpoint, links, model, reader)
    special = export_tokenizer(args, folder)
    dtype = reader.dtypes["embedding.word_embeddings.weight"]
    save_config(folder, model, family, dtype, special)

    def tensors() -> Iterator[Tensor]:
        for link in links:
            whole = reader.read(link.key, link.expert)
            yield from split(link, whole, model)
            if link.key.endswith(".router.thresholds.average"):
                updates = reader.read(link.key.removesuffix("average") + "updates")
                yield _thresholds(whole, updates, model)

    plan = []
    for link in links:
        dtype = reader.dtypes[link.key]
        plan += [Planned(name, shape, dtype) for name, shape in link.parts]
        if link.key.endswith(".router.thresholds.average"):
            plan.append(Planned(_derived(link.parts[0][0]), link.shape, torch.float32))

    def write(done: Done) -> None:
        write_safetensors(folder, plan, tensors(), SHARD_BYTES, done)

    return Conversion(sum(entry.bytes for entry in plan), write)


def gguf_to_hf(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Conversion:
    """Write a GGUF file of a Llama model as a Hugging Face folder, all but its tensors.

    Args:
        file: to be read.
        folder: must be there and empty.
        dtype: of the folder's tensors. What is quantised needs fp32 to be kept as it is.

    Raises:
        UserError: the file is damaged, or of an architecture or tokenizer not known here.
    """
    from megatron_ext.hf.gguf_tokenizer import save_tokenizer  # of an optional package

    source = GGUFModel(file)
    model, family = source.architecture, family_named("llama")
    parts = [part for link in family.links(model) for part in link.parts]
    _account(file, dict(parts), source.shapes)
    save_config(folder, model, family, dtype, save_tokenizer(source, folder))
    plan = [Planned(name, shape, dtype) for name, shape in parts]

    def write(done: Done) -> None:
        tensors = (source.read(name).to(dtype) for name, _ in parts)
        write_safetensors(folder, plan, tensors, SHARD_BYTES, done)

    return Conversion(sum(entry.bytes for entry in plan), write)


def _with_rows(model: Architecture, args: Namespace, reader: TorchDistReader) -> Architecture:
    """Keep the rows beyond the tokenizer's that a model brought from Hugging Face."""
    rows = getattr(args, "hf_vocab_size", None)
    embedding = reader.shapes.get("embedding.word_embeddings.weight", (0,))
    if rows is None or rows > embedding[0]:
        return model
    return replace(model, vocab=rows)


def _account_megatron(
    checkpoint: Path, links: list[Link], model: Architecture, reader: TorchDistReader
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for link in links:
        stacked = () if link.expert is None else (model.experts,)
        expected[link.key] = (*stacked, *link.shape)
    vocabulary = {link.key for link in links if link.layout is Layout.VOCABULARY}
    found = dict(reader.shapes)
    for key in vocabulary & found.keys():
        if found[key][0] >= model.vocab:
            found[key] = (model.vocab, *found[key][1:])  # the rest is padding
    _account(checkpoint, expected, found)


def _account(place: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise for the first tensor that is missing, left over or of another shape."""
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{place} has no tensor {name}, which a model of its configuration needs")
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{place} has a tensor {name}, which no model of its configuration has")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{place}: {name} has shape {found[name]} where {shape} is expected")


def _thresholds(average: Tensor, updates: Tensor, model: Architecture) -> Tensor:
    if not int(updates):
        raise UserError("the thresholds have no value yet: train for at least one step first")
    state = Thresholds(model.experts, model.ema_decay, device="cpu")
    state.load_state_dict({"average": average, "updates": updates})
    return state.value()


def _derived(name: str) -> str:
    return name.replace(_AVERAGE, _THRESHOLDS)


def to_megatron(source: Path, folder: Path, final: Path) -> Conversion:
    """Make of a Hugging Face folder one of checkpoints, all but its one checkpoint.

    That has no optimizer.

    Sets Megatron's global arguments: once a process.

    Args:
        source: with config.json and safetensors.
        folder: must be there and empty.
        final: where the folder will be moved, for what names its place.

    Raises:
        UserError: the source is incomplete, or of no family known here.
    """
    config = load_config(source)
    family, model = family_named(config.model_type), read_config(config)
    if reason := family.misfit(model):
        raise UserError(f"{source} is no {family.name} model that can be converted: {reason}")
    reader = SafetensorsReader(source)
    links = family.links(model)
    expected = {name: shape for link in links for name, shape in link.parts}
    expected |= {_derived(n): shape for n, shape in expected.items() if n.endswith(_AVERAGE)}
    _account(source, expected, reader.shapes)
    _check_thresholds(source, links, model, reader)
    dtype = reader.dtypes["model.embed_tokens.weight"]
    args = _arguments(source, folder, final, model, dtype)
    checkpoint = folder / _RELEASE

    def write(done: Done) -> None:
        checkpoint.mkdir()
        chunks = [_chunk(link, model, reader, args.padded_vocab_size, done) for link in links]
        write_torch_dist(checkpoint, chunks, _objects(links, model, args))
        save_integrity_manifest(str(checkpoint))
        (folder / TRACKER).write_text(_RELEASE)

    sizes = {n: torch.Size(shape).numel() for n, shape in reader.shapes.items()}
    total = sum(sizes[n] * reader.dtypes[n].itemsize for link in links for n, _ in link.parts)
    return Conversion(total, write)


def _check_thresholds(
    source: Path, links: list[Link], model: Architecture, reader: SafetensorsReader
) -> None:
    for link in links:
        name = link.parts[0][0]
        if name.endswith(_AVERAGE):
            average, updates = (
                reader.read(n) for n in (name, name.replace("_average", "_updates"))
            )
            if not torch.equal(_thresholds(average, updates, model), reader.read(_derived(name))):
                raise UserError(
                    f"{source}: {_derived(name)} is not what {name} gives, so training could not "
                    "go on from it: change both"
                )


def _arguments(
    source: Path, folder: Path, final: Path, model: Architecture, dtype: torch.dtype
) -> Namespace:
    """The arguments that a run of this model would save, its tokenizer beside them."""
    tokenizer = import_tokenizer(source, folder, model.vocab)
    precision = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(dtype, [])
    # What only matters to the run itself, and a run that goes on gives anew.
    run = [
        "--et-warmup-iters",
        "0",
        "--mock-data",
        "--micro-batch-size",
        "1",
        "--train-iters",
        "1",
        "--lr",
        "1e-4",
    ]
    args, _ = parse_args([*to_flags(model), *tokenizer, *precision, *run])
    if args.tokenizer_model is not None:
        args.tokenizer_sha256 = sha256(args.tokenizer_model)
        args.tokenizer_model = str(final.absolute() / Path(args.tokenizer_model).name)
    else:
        args.tokenizer_sha256 = None
    args.no_save_optim = True
    args.iteration = 0
    multiple = args.make_vocab_size_divisible_by
    args.hf_vocab_size = model.vocab
    rows = -(-model.vocab // multiple) * multiple
    args.padded_vocab_size = max(args.padded_vocab_size, rows)
    return args


def _chunk(
    link: Link, model: Architecture, reader: SafetensorsReader, rows: int, done: Done
) -> Chunk:
    def make() -> Tensor:
        parts = [reader.read(name) for name, _ in link.parts]
        done(sum(part.nbytes for part in parts))
        return join(link, parts, model, rows)

    shape: tuple[int, ...] = link.shape
    if link.layout is Layout.VOCABULARY:
        shape = (rows, *shape[1:])
    if link.expert is not None:
        shape = (model.experts, *shape)
    return Chunk(link.key, shape, link.expert, reader.dtypes[link.parts[0][0]], make)


def _objects(links: list[Link], model: Architecture, args: Namespace) -> dict[str, Any]:
    """What Megatron saves beside tensors: each linear layer has a place for a state of its own."""
    objects: dict[str, Any] = {}
    for link in links:
        module, _, kind = link.key.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2].startswith("linear_"):
            place = "0_1" if link.expert is None else f"{link.expert}_{model.experts}"
            objects[f"{module}._extra_state/shard_{place}"] = None
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": True,
        },
    }
    return objects | {"common_state/shard_0_1": common}
