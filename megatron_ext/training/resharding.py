"""Loading of optimizer state from a checkpoint of another parallel layout.

Tensors in a checkpoint have global names and shapes, and any layout can load them. The remaining
state has the structure of the optimizer that saved it: one optimizer or two (experts have a
separate one with expert parallelism), sharded over data-parallel ranks or not, parameter groups of
the first rank alone; with Muon, a chain of optimizers within another. Megatron expects the
structure of the run that loads, and fails otherwise. Here the state is read in any structure and
converted to that of this run.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    param_group_identifier_keys,
)

from megatron_ext.errors import UserError
from megatron_ext.optimizer import WholeMatrices

_RESHARDABLE = "fully_reshardable"
_KNOWN = (
    DistributedOptimizer,
    FP32Optimizer,
    Float16OptimizerWithFloat16Params,
    WholeMatrices,
)
# Names of the main parameters in a sharded optimizer and in one that is not sharded. Muon steps
# whole matrices in either case, but a checkpoint has one name for all parameters.
_SHARDED_NAME, _WHOLE_NAME = "optimizer.state.param.", "optimizer.state.fp32_param."
# Key of the tensors that a run requests, which separates them from the rest of the loaded state.
_REQUESTED = "requested"

# Settings of a parameter group that come from flags, and not from the scheduler.
_BY_FLAGS = ("betas", "eps", "momentum", "nesterov")

_load_content_metadata = dist_checkpointing.load_content_metadata
_sharded_state_dict = ChainedOptimizer.sharded_state_dict
_load_state_dict = ChainedOptimizer.load_state_dict


def check_resharding(checkpoint: Path, saved: Namespace, args: Namespace) -> None:
    """Refuse a checkpoint whose optimizer state this run cannot load.

    Args:
        checkpoint: Folder of the checkpoint, for the message.
        saved: Arguments of the run that saved it.
        args: Arguments of this run.

    Raises:
        UserError: A setting differs; the message names it and the fix.
    """
    if args.no_load_optim or args.finetune or getattr(saved, "no_save_optim", False):
        return
    advice = "or begin with a new optimizer by --no-load-optim."
    muon = ("muon_router",) if args.optimizer == "muon" else ()
    for name in ("optimizer", "bf16", "fp16", *muon):
        current, previous = getattr(args, name), getattr(saved, name, None)
        if current != previous:
            raise UserError(
                f"{checkpoint} was trained with {name} = {previous}, but the flags say "
                f"{current}. Make them equal, {advice}"
            )
    sharded = saved.use_distributed_optimizer or _distributes_matrices(saved)
    if not sharded or saved.dist_ckpt_optim_fully_reshardable:
        return
    names = (
        "use_distributed_optimizer",
        "use_layer_wise_distributed_optimizer",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )
    for name in names:
        current, previous = getattr(args, name), getattr(saved, name, False)
        if current != previous:
            raise UserError(
                f"{checkpoint} was saved with --no-dist-ckpt-optim-fully-reshardable and {name} = "
                f"{previous}, but the flags say {current}. Save it once more from there without "
                f"that flag, {advice}"
            )


@functools.wraps(_load_content_metadata)
def load_content_metadata(*args: Any, **kwargs: Any) -> Any:
    """Add to the metadata of an unsharded checkpoint how a sharded optimizer reads it."""
    metadata = _load_content_metadata(*args, **kwargs)
    if metadata is not None and "distrib_optim_sharding_type" not in metadata:
        metadata["distrib_optim_sharding_type"] = _RESHARDABLE
        metadata["saved_unsharded"] = True
    return metadata


@functools.wraps(_sharded_state_dict)
def sharded_state_dict(
    self: ChainedOptimizer, model: Any, is_loading: bool = False, **kwargs: Any
) -> Any:
    """Give main parameters the names that they have in the checkpoint."""
    state = _sharded_state_dict(self, model, is_loading, **kwargs)
    metadata = kwargs.get("metadata") or {}
    reshardable = metadata.get("distrib_optim_sharding_type") == _RESHARDABLE
    inner = isinstance(self, LayerWiseDistributedOptimizer)
    if inner or not reshardable or any(type(part) not in _KNOWN for part, _ in _parts(self, state)):
        return state
    names = (_WHOLE_NAME, _SHARDED_NAME)
    for tensor in nested_values(state):
        old, new = names[::-1] if metadata.get("saved_unsharded", False) else names
        if str(getattr(tensor, "key", "")).startswith(old):
            tensor.key = new + tensor.key.removeprefix(old)
    if not is_loading:
        return state
    for optimizer, part in _parts(self, state):
        if isinstance(optimizer, DistributedOptimizer) and not _has_main_params(optimizer):
            for tensors in part["param_state"].values():
                tensors.pop("param")  # parameters of the model, which the model loads
    return {_REQUESTED: state}


@functools.wraps(_load_state_dict)
def load_state_dict(self: ChainedOptimizer, state: Any) -> None:
    """Load the optimizer state of any layout."""
    if isinstance(state, dict) and _REQUESTED in state:
        parts = _parts(self, state.pop(_REQUESTED))
        converted = [_convert_state(optimizer, part, state) for optimizer, part in parts]
        state = converted[0] if len(converted) == 1 else dict(enumerate(converted))
    _load_state_dict(self, state)


def replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacements of Megatron's functions that load a checkpoint."""
    chain = "megatron.core.optimizer.optimizer.ChainedOptimizer"
    return {
        "megatron.core.dist_checkpointing.load_content_metadata": load_content_metadata,
        f"{chain}.sharded_state_dict": sharded_state_dict,
        f"{chain}.load_state_dict": load_state_dict,
    }


def _distributes_matrices(args: Namespace) -> bool:
    """Return whether the distributed optimizer of a run distributes whole matrices."""
    return getattr(args, "use_layer_wise_distributed_optimizer", False)


def _has_main_params(optimizer: MegatronOptimizer) -> bool:
    """Return whether the optimizer has an fp32 copy of the parameters of the model."""
    return bool(optimizer.config.bf16 or optimizer.config.fp16)


def _parts(chain: ChainedOptimizer, state: Any) -> Iterator[tuple[MegatronOptimizer, Any]]:
    """Yield each optimizer of a chain, including nested chains, with its part of the state."""
    optimizers = chain.chained_optimizers
    for i, optimizer in enumerate(optimizers):
        part = state if len(optimizers) == 1 else state.get(i, {})
        if isinstance(optimizer, ChainedOptimizer):
            yield from _parts(optimizer, part)
        else:
            yield optimizer, part


def _find_entries(state: Any, name: str) -> Iterator[Any]:
    """Yield the entries of a name at any depth of nested dictionaries."""
    if isinstance(state, dict):
        if state.get(name) is not None:
            yield state[name]
        for key, value in state.items():
            if key != name:
                yield from _find_entries(value, name)


def _convert_state(optimizer: MegatronOptimizer, part: Any, saved: Any) -> dict[str, Any]:
    """Return loaded state in the structure that an optimizer of this run loads.

    Args:
        optimizer: Optimizer of this run.
        part: Tensors that the optimizer requested.
        saved: Rest of the loaded state, in the structure in which it was saved.
    """
    saved_groups = [group for groups in _find_entries(saved, "param_groups") for group in groups]
    steps = [
        *_find_entries(saved, "common_step"),
        *(g["step"] for g in saved_groups if g.get("step")),
    ]
    counts_steps = not isinstance(optimizer.optimizer, TensorParallelMuon)
    groups = []
    for current in optimizer.optimizer.state_dict()["param_groups"]:
        groups.append(match_param_group(current, saved_groups))
        if steps and counts_steps:
            groups[-1]["step"] = int(steps[0])
    scalers = list(_find_entries(saved, "grad_scaler"))
    scaler = {"grad_scaler": scalers[0]} if scalers else {}
    if isinstance(optimizer, DistributedOptimizer):
        return {
            "optimizer": {"param_groups": groups},
            "param_state": part.get("param_state", {}),
            "param_state_sharding_type": _RESHARDABLE,
            **scaler,
        }
    nested = isinstance(optimizer, WholeMatrices | Float16OptimizerWithFloat16Params)
    tensors = (part.get("optimizer", {}) if nested else part).get("state", {})
    inner: dict[str, Any] = {
        "state": {key: value for key, value in tensors.items() if key != "common_step"},
        "param_groups": groups,
    }
    if steps and isinstance(optimizer.optimizer, torch.optim.Adam):
        inner["state"]["common_step"] = torch.tensor(float(steps[0]))
    if not nested:
        return inner
    main_params = {key: part[key] for key in ("fp32_from_fp16_params",) if key in part}
    return {"optimizer": inner, **main_params, **scaler}


def match_param_group(
    current: dict[str, Any], saved_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the saved settings of a parameter group, with the parameters of this run.

    Settings that come from flags, and not from a schedule, are those of this run, which
    `megatron_ext.training.resume_checks` has compared with the checkpoint.

    A group of which the first rank had no parameters was not saved. It takes the settings of a
    similar group, and the scheduler sets its learning rate and weight decay before the next step.

    Args:
        current: Parameter group of this run.
        saved_groups: All saved parameter groups.
    """
    identifiers = {key: current[key] for key in param_group_identifier_keys if key in current}

    def matches(saved: dict[str, Any], except_key: str = "") -> bool:
        keys = [key for key in param_group_identifier_keys if key != except_key]
        return all(saved.get(key) == current.get(key) for key in keys)

    exact = (group for group in saved_groups if matches(group))
    similar = (group for group in saved_groups if matches(group, "is_expert_parallel"))
    settings = next(exact, None) or next(similar, None) or current
    flags = {key: current[key] for key in _BY_FLAGS if key in current}
    return {**settings, **flags, **identifiers, "params": current["params"]}
