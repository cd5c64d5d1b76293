"""Copies of checkpoints with new thresholds, for models trained with any router."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint import read_common_state
from megatron_ext.data.run_tokenizer import locate_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import from_args
from megatron_ext.hf.convert import Conversion, Done
from megatron_ext.hf.release import settle, write_release
from megatron_ext.hf.sources import check_finite, with_rows
from megatron_ext.hf.starting_recipe import write_recipe
from megatron_ext.hf.tokenizer_export import carry_tokenizer
from megatron_ext.hf.torch_dist import TensorChunk, TorchDistReader
from megatron_ext.model.identity import setting_value
from megatron_ext.moe.thresholds import Thresholds

CALIBRATION = "calibration.json"
"""File next to a checkpoint in which tools.calibrate_thresholds describes its thresholds."""

_ROUTER, _THRESHOLDS = ".mlp.router.weight", ".mlp.router.thresholds."
_EXPERTS = ".mlp.experts.experts."


def use_thresholds(args: Namespace) -> None:
    """Change a run's arguments to those of the same model with thresholds.

    Args:
        args: Megatron's arguments of the run, which are modified.

    Raises:
        UserError: The model has no experts, or cannot be converted.
    """
    model = from_args(args)
    if model.router is None:
        raise UserError("The model has no experts. Add experts to it with tools.upcycle.")
    if not model.thresholds:
        # An expert's weight was its softmax over all experts, or over those chosen.
        vars(args).update(
            et_gate="softmax",
            et_mean_experts=None,
            moe_router_pre_softmax=False,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_router_dtype="fp32",
        )
    args.router_type = "expert-threshold"


def with_thresholds(
    checkpoint: Path,
    folder: Path,
    final: Path,
    cutoffs: dict[int, Tensor],
    tokenizer_model: str | None = None,
) -> Conversion:
    """Copy a checkpoint with new thresholds and without its optimizer, except for its tensors.

    Args:
        checkpoint: Folder of one iteration.
        folder: An existing, empty folder.
        final: Path to which the folder will be moved, which the checkpoint refers to.
        cutoffs: Cutoffs of each layer with experts, by its number from 0, fp32 `[experts]`.
        tokenizer_model: File or folder of the tokenizer. Default: the one that training used.
    """
    args = read_common_state(checkpoint)["args"]
    use_thresholds(args)
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    else:
        locate_tokenizer(args, checkpoint)
    flags = carry_tokenizer(args, folder, checkpoint)
    if flags[-2] == "--tokenizer-model":
        args.tokenizer_model = flags[-1]
    settle(args, final)
    reader = TorchDistReader(checkpoint)
    model, dtype = (
        with_rows(from_args(args), args, reader),
        reader.dtypes["embedding.word_embeddings.weight"],
    )
    write_recipe(folder, model, dtype, flags, str(checkpoint), has_thresholds=True)

    def write(done: Done) -> None:
        write_release(folder, _chunks(checkpoint, reader, args, cutoffs, done), args)

    sizes = (
        torch.Size(shape).numel() * reader.dtypes[n].itemsize
        for n, shape in _without_thresholds(reader)
    )
    return Conversion(sum(sizes), write)


def _without_thresholds(reader: TorchDistReader) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in reader.shapes.items() if _THRESHOLDS not in name]


def _chunks(
    checkpoint: Path,
    reader: TorchDistReader,
    args: Namespace,
    cutoffs: dict[int, Tensor],
    done: Done,
) -> list[TensorChunk]:
    def copy(name: str, place: int | None = None) -> Tensor:
        tensor = reader.read(name, place)
        check_finite(checkpoint, name, tensor)
        done(tensor.nbytes)
        return tensor

    def constant(tensor: Tensor) -> Tensor:
        return tensor

    chunks: list[TensorChunk] = []
    for name, shape in _without_thresholds(reader):
        for place in range(shape[0]) if _EXPERTS in name else (None,):
            chunks.append(
                TensorChunk(name, shape, place, reader.dtypes[name], partial(copy, name, place))
            )
        if name.endswith(_ROUTER):
            prefix = name.removesuffix(_ROUTER)
            values = cutoffs[int(prefix.rpartition(".")[2])]
            adaptive = setting_value(args, "et_threshold_estimator") == "adaptive"
            state = Thresholds(len(values), args.et_ema_decay, device="cpu", adaptive=adaptive)
            state.start_at(values)
            for key, tensor in state.state_dict().items():
                key, shape = f"{prefix}{_THRESHOLDS}{key}", tuple(tensor.shape)
                chunks.append(
                    TensorChunk(key, shape, None, tensor.dtype, partial(constant, tensor))
                )
    return chunks
