"""Optimizer of the paper: Muon for the matrices of the blocks, AdamW for the rest.

Megatron's `--optimizer muon` orthogonalizes q, k and v separately, each expert's matrices
separately and a tensor-parallel matrix as a whole, and lets each data-parallel rank step whole
matrices when the optimizer is distributed. This module adds learning rates for the embedding and
for the other parameters of AdamW, scaled by width; AdamW for the router; a warm-up of the momentum;
and a distributed optimizer in fp32.
"""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer import FP32Optimizer, OptimizerConfig
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.training import get_args, training
from megatron.training.models import dist_utils

from megatron_ext import patches
from megatron_ext.devices import is_cpu_device

# Momentum of the first step. As in the code of the paper, it is not an option.
_FIRST_MOMENTUM = 0.85
_ROUTERS, _EMBEDDINGS = ("router.weight", "gate_weight"), "embeddings.weight"

_init_layer_wise = LayerWiseDistributedOptimizer.__init__
_get_config = training.get_megatron_optimizer_config
_wrap = dist_utils._ddp_wrap


def add_muon_arguments(parser: ArgumentParser) -> None:
    """Add the flags that Megatron's Muon lacks."""
    group = parser.add_argument_group("muon")
    group.add_argument(
        "--muon-embedding-lr",
        type=float,
        default=0.2,
        metavar="LR",
        help="Learning rate of AdamW for the token embeddings with --optimizer muon. Default: 0.2.",
    )
    group.add_argument(
        "--muon-head-lr",
        type=float,
        default=0.004,
        metavar="LR",
        help="Learning rate of AdamW with --optimizer muon for the output head, the routers (see "
        "--muon-router) and every parameter that is not a matrix. --lr is the learning rate of "
        "Muon. All learning rates decay to the same fraction of their peak. Default: 0.004.",
    )
    group.add_argument(
        "--muon-router",
        choices=["adam", "muon"],
        default="adam",
        help="Optimizer of the router weights with --optimizer muon: AdamW, as in the code of the "
        "paper, or Muon, as in its table. Default: adam.",
    )
    group.add_argument(
        "--muon-momentum-warmup-iters",
        type=int,
        default=300,
        metavar="STEPS",
        help=f"Number of steps in which the momentum of Muon grows from {_FIRST_MOMENTUM} to "
        "--muon-momentum. 0 starts with --muon-momentum. Default: 300.",
    )
    group.add_argument(
        "--muon-reference-width",
        type=int,
        default=768,
        metavar="SIZE",
        help="Hidden size for which the learning rates of --optimizer muon are meant. They are "
        "multiplied by (hidden size / SIZE) ** -0.5. Default: 768.",
    )


def paper_flags(args: Namespace) -> list[str]:
    """Return the paper's settings of `--optimizer muon`, which flags of the user override.

    The learning rate is constant, and decays to --min-lr in the last fifth of the steps.
    """
    if args.optimizer != "muon":
        return []
    unit = "samples" if args.train_samples else "iters"
    steps = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}") or 0
    flags = [
        *("--lr", "0.02", "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear"),
        *(f"--lr-wsd-decay-{unit}", str(round(steps / 5))),
        *("--muon-momentum", "0.95", "--muon-nesterov", "--muon-coefficient-type", "simple"),
        *("--muon-scale-mode", "shape_scaling", "--muon-tp-mode", "duplicated"),
        *("--adam-beta1", "0.8", "--adam-beta2", "0.95", "--adam-eps", "1e-10"),
        *("--weight-decay", "0", "--clip-grad", "0"),
    ]
    if is_cpu_device():
        flags += ["--muon-fp32-matmul-prec", "high"]  # the default computes in bf16
    return flags


def replacements() -> dict[str, Any]:
    """Return Megatron's Muon with learning rates for each kind of parameter.

    Without `--optimizer muon` the replacements change nothing.
    """
    other_parameters = ParamWithNamePredicate(
        "not of muon", lambda parameter, name: not _uses_muon(parameter, name)
    )
    key = ParamKey(with_name_predicate=other_parameters)
    muon = replace(
        _EMERGING_OPTIMIZERS["muon"], default_param_overrides={key: {"optimizer": "adam"}}
    )
    return {
        "megatron.core.optimizer.emerging_optimizers._EMERGING_OPTIMIZERS.muon": muon,
        "megatron.training.training.get_megatron_optimizer_config": optimizer_config,
    }


def layer_wise_replacements() -> dict[str, Callable[..., Any]]:
    """Return Megatron's layer-wise optimizer with the parts that it lacks."""
    owner = "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer"
    return {
        "megatron.training.models.dist_utils._ddp_wrap": wrap,
        f"{owner}.__init__": init_layer_wise,
    }


def wrapping_replacements() -> dict[str, Any]:
    """Return the optimizer by which a model's buffers of gradients are laid out."""
    optimizer = LayerWiseDistributedOptimizer
    return {"megatron.training.models.dist_utils.DistributedOptimizer": optimizer}


def warm_momentum(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `train_step` so that Muon has the momentum of the iteration."""

    @functools.wraps(train_step)
    def wrapped(step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> Any:
        args = get_args()
        if args.optimizer == "muon":
            for group in optimizer.param_groups:
                if "momentum" in group:
                    group["momentum"] = momentum_at(
                        kwargs["iteration"], args.muon_momentum, args.muon_momentum_warmup_iters
                    )
        return train_step(step, data, model, optimizer, *rest, **kwargs)

    return wrapped


def momentum_at(iteration: int, momentum: float, warmup: int) -> float:
    """Return the momentum of Muon in a step.

    Args:
        iteration: Number of the step, from 0.
        momentum: Momentum after the warm-up.
        warmup: Number of warm-up steps.
    """
    done = min(iteration / warmup, 1.0) if warmup else 1.0
    first = min(_FIRST_MOMENTUM, momentum)
    return first + (momentum - first) * done


@functools.wraps(_get_config)
def optimizer_config(args: Namespace) -> tuple[OptimizerConfig, Any]:
    """Return Megatron's configuration, with a learning rate for each kind of parameter."""
    config, overrides = _get_config(args)
    if args.optimizer != "muon":
        return config, overrides
    scale = (args.hidden_size / args.muon_reference_width) ** -0.5

    def rates(peak: float) -> dict[str, float]:
        return {"max_lr": peak * scale, "min_lr": peak * scale * args.min_lr / args.lr}

    def is_embedding(parameter: torch.nn.Parameter, name: str) -> bool:
        return name.endswith(_EMBEDDINGS)

    def is_other(parameter: torch.nn.Parameter, name: str) -> bool:
        return not is_embedding(parameter, name) and not _uses_muon(parameter, name)

    config.lr, config.min_lr = rates(args.lr).values()
    for kind, belongs, peak in (
        ("embedding", is_embedding, args.muon_embedding_lr),
        ("other", is_other, args.muon_head_lr),
    ):
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(kind, belongs))
        overrides[key] = rates(peak)
    return config, overrides


@functools.wraps(_wrap)
def wrap(model: list[torch.nn.Module], random: bool, ddp_config: Any, *rest: Any, **kw: Any) -> Any:
    """Wrap a model so that gradients of whole matrices reach the rank that steps them.

    Megatron does so only in its older way of building a model. In the newer way every rank would
    store and reduce all gradients.
    """
    if not get_args().use_layer_wise_distributed_optimizer:
        return _wrap(model, random, ddp_config, *rest, **kw)
    ddp_config.use_distributed_optimizer = True
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            parameter.is_managed_by_layer_wise_optimizer = _uses_muon(parameter, name)  # type: ignore[attr-defined]
            parameter.use_muon = _uses_muon(parameter, name)  # type: ignore[attr-defined]  # of 0.20
    with patches.applied("matrix gradients"):
        return _wrap(model, random, ddp_config, *rest, **kw)


class WholeMatrices(FP32Optimizer):
    """Part of a distributed optimizer in fp32 that Muon steps, saved with the structure of bf16."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the sharded state under the key `optimizer`."""
        return {"optimizer": super().sharded_state_dict(*args, **kwargs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state under the key `optimizer`."""
        super().load_state_dict(state_dict["optimizer"])


@functools.wraps(_init_layer_wise)
def init_layer_wise(
    self: LayerWiseDistributedOptimizer,
    optimizers: list[Any],
    config: OptimizerConfig,
    pg_collection: Any = None,
    init_state_fn_list: list[Any] | None = None,
    model_chunks: list[Any] | None = None,
) -> None:
    """Construct the optimizer, and wrap torch's optimizers in fp32 as Megatron does in bf16."""
    if not config.bf16:
        assert init_state_fn_list is not None
        optimizers = [
            WholeMatrices(optimizer, config, init_state)
            for optimizer, init_state in zip(optimizers, init_state_fn_list, strict=True)
        ]
    _init_layer_wise(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)


def _uses_muon(parameter: torch.nn.Parameter, name: str) -> bool:
    """Return whether Muon optimizes a parameter: a matrix of a block, or of a router by choice."""
    outer = getattr(parameter, "is_embedding_or_output_parameter", False)
    if parameter.dim() != 2 or outer or name.endswith(_EMBEDDINGS):
        return False
    return get_args().muon_router == "muon" or not name.endswith(_ROUTERS)
