"""Start of Megatron for an engine, with the flags of the model, its layout and its training."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training import global_vars, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import unset_global_variables
from megatron.training.initialize import initialize_megatron

from alignment.engines.protocol import Optimization
from megatron_ext import patches
from megatron_ext.arguments import explained, parse_args
from megatron_ext.config import ETConfig
from megatron_ext.data.tokenizer_identity import tokenizer_digest
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, from_args, to_flags
from megatron_ext.hf.sources import Source
from megatron_ext.model.language_model import language_model_config


@dataclass(frozen=True)
class MegatronLayout:
    """Division of a model among ranks. The remaining ranks have replicas of it, with other data.

    Attributes:
        tensor: Ranks that divide the tensors of a layer.
        pipeline: Ranks that divide the layers.
        context: Ranks that divide the rows of a batch.
        expert: Ranks that divide the experts.
        expert_tensor: Ranks that divide the tensors of an expert. Default: `tensor`.
        shard_optimizer: Whether the replicas divide the optimizer's state among them.
        micro_batch: Rows of a micro-batch.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    shard_optimizer: bool = False
    micro_batch: int = 1

    @property
    def flags(self) -> list[str]:
        """Flags of `pretrain_et.py` for this layout."""
        sizes = {
            "tensor-model-parallel-size": self.tensor,
            "pipeline-model-parallel-size": self.pipeline,
            "context-parallel-size": self.context,
            "expert-model-parallel-size": self.expert,
            "expert-tensor-parallel-size": self.expert_tensor or self.tensor,
            "micro-batch-size": self.micro_batch,
        }
        flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        flags += ["--sequence-parallel"] if self.tensor > 1 else []
        flags += ["--use-distributed-optimizer"] if self.shard_optimizer else []
        return flags

    @property
    def length_multiple(self) -> int:
        """Number of which the length of rows must be a multiple."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)


def start(
    source: Source,
    layout: MegatronLayout,
    optimization: Optimization | None,
    dtype: torch.dtype | None,
    flags: Sequence[str],
    same_model: bool = True,
) -> tuple[Namespace, ETConfig]:
    """Parse the flags of a model and start Megatron with them; see `MegatronEngine`."""
    first = global_vars._GLOBAL_ARGS is None
    if not first:
        _check_same_layout(global_vars._GLOBAL_ARGS, layout)
        unset_global_variables()  # the previous engine has references to its own arguments
        destroy_rerun_state_machine()
    model, frozen = source.model, optimization is None
    if not frozen:
        check_samples_per_row(model, layout.tensor, layout.context)
    optimization = optimization or Optimization()
    dtype = dtype or (torch.float32 if is_cpu_device() else source.dtype)
    # From Megatron's default of 2 ** 32 a run would skip some 16 steps until gradients fit in fp16.
    fp16 = ["--fp16", "--initial-loss-scale", "65536"]
    precision = {torch.bfloat16: ["--bf16"], torch.float16: fp16}.get(dtype, [])
    copies = int(os.environ.get("WORLD_SIZE", "1")) // (
        layout.tensor * layout.pipeline * layout.context
    )
    values: dict[str, Any] = {
        "global_batch_size": layout.micro_batch * max(copies, 1),  # Megatron requires a multiple
        "train_iters": optimization.steps,
        "lr": optimization.lr,
        "min_lr": 0.0,
        "lr_decay_style": "linear",
        "lr_warmup_iters": optimization.warmup,
        "weight_decay": optimization.weight_decay,
        "adam_beta1": optimization.betas[0],
        "adam_beta2": optimization.betas[1],
        "adam_eps": optimization.eps,
        "clip_grad": optimization.clip,
        # Attention of Transformer Engine does not support several samples per row.
        "transformer_impl": "local",
    }
    if model.router is not None:
        values |= {
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    # Steps are not repeated; values that are not finite end the run.
    words = ["--rerun-mode", "disabled"]
    words += ["--skip-train"] if frozen else []  # neither optimizer nor buffers of gradients
    words += ["--mock-data", "--calculate-per-token-loss", "--no-rope-fusion"]
    words += ["--et-warmup-iters", "0"] if model.thresholds else []
    args, config = parse_args(flags, defaults=[*to_flags(model, values), *precision, *words])
    if same_model:
        _check_same_function(args, model)
    multiple = args.make_vocab_size_divisible_by * layout.tensor
    args.hf_vocab_size = model.vocab
    args.padded_vocab_size = max(args.padded_vocab_size, -(-model.vocab // multiple) * multiple)
    args.tokenizer_sha256 = tokenizer_digest(args)
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        backend = "gloo" if is_cpu_device() else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    explained(initialize_megatron)
    if first:
        patches.apply("optimizer")
        patches.apply("checkpoints")
    return args, config


def check_samples_per_row(model: Architecture, tensor: int, context: int) -> None:
    """Refuse to train a model on a layout that requires a single sample per row.

    Args:
        model: Shape of the model.
        tensor: Tensor parallel size.
        context: Context parallel size.

    Raises:
        UserError: Tokens of a Gated DeltaNet layer's samples are on several ranks.
    """
    if model.hybrid and tensor * context > 1:
        raise UserError(
            "A model with Gated DeltaNet layers is trained with several samples per row, which "
            "requires tensor and context parallel sizes of 1. Use data, expert or pipeline "
            "parallelism."
        )


def _check_same_function(args: Namespace, model: Architecture) -> None:
    """Refuse flags that would change the function of the weights."""
    flagged = from_args(args)
    for name in (field.name for field in fields(Architecture)):
        # Padding, training losses, and a bound that rotary positions do not require may differ.
        if name in ("vocab", "aux_loss", "max_length"):
            continue
        flag_value, model_value = getattr(flagged, name), getattr(model, name)
        if flag_value != model_value:
            raise UserError(
                f"--megatron-flags change the model of these weights: {name} = {flag_value}, which "
                f"was trained with {model_value}. Leave out the flag that changes it."
            )


def _check_same_layout(before: Namespace, layout: MegatronLayout) -> None:
    """Refuse another layout, as the engines of a process share Megatron's process groups."""
    names = ("tensor", "pipeline", "context", "expert")
    sizes = [getattr(before, f"{name}_model_parallel_size", 1) for name in names[:2]]
    sizes += [before.context_parallel_size, before.expert_model_parallel_size]
    for name, size in zip(names, sizes):
        if getattr(layout, name) != size:
            raise UserError(
                f"Models on the same ranks must have the same layout, and {name} is {size} for one "
                f"and {getattr(layout, name)} for another. Choose one size for both."
            )


def build(args: Namespace, config: ETConfig) -> tuple[list[Any], Any, Any]:
    """Return the model, in a data-parallel wrapper if it is trained, its optimizer and schedule."""
    model, optimizer, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, language_model_config(args, config)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if optimizer is None:
        return model, None, None
    # Megatron's schedule counts samples, and the layout decides how many a step has. Here it counts
    # steps, so that another layout can resume.
    with patches.patched(args, "global_batch_size", 1):
        schedule = training.get_optimizer_param_scheduler(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer, schedule
