"""Start of DeepSpeed on a rank: settings of ZeRO, ranks, the model and its optimizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.dropout import _DropoutNd

from alignment.data.model_tokenizer import read_tokenizer
from alignment.engines.protocol import Optimization
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens, record_end_tokens
from megatron_ext.hf.families import OWN

ON_CPU = is_cpu_device() or not torch.cuda.is_available()
if ON_CPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
try:
    import deepspeed
except ImportError as error:
    raise UserError(
        "DeepSpeed is not installed. Install it with pip install 'megatron-et[deepspeed]'."
    ) from error
from deepspeed.utils.logging import logger  # noqa: E402


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of ZeRO, which divides the state of training among ranks.

    Attributes:
        stage: 1 for the optimizer's state, 2 for gradients too, 3 for parameters too.
        offload_optimizer: Whether the optimizer's state is in host memory and updated there.
        offload_parameters: Whether parameters are in host memory too. Requires stage 3.
        micro_batch: Rows of a micro-batch.
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    micro_batch: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: A setting is out of its range.
        """
        if self.stage not in (1, 2, 3):
            raise UserError(f"There is no ZeRO stage {self.stage}. Choose 1, 2 or 3.")
        if self.offload_parameters and self.stage < 3:
            raise UserError("--offload-parameters requires --zero-stage 3.")


def start_ranks() -> None:
    """Initialize DeepSpeed, and torch.distributed unless the caller has initialized it."""
    logger.setLevel("WARNING")
    backend = "gloo" if ON_CPU else "nccl"
    if "WORLD_SIZE" not in os.environ:  # started without torchrun, which DeepSpeed does not expect
        os.environ.setdefault("LOCAL_RANK", "0")
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if ON_CPU:
        # Otherwise DeepSpeed compiles its shared-memory collectives at their first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Return a model of transformers, without dropout.

    Args:
        folder: A Hugging Face folder.
        dtype: Dtype of the weights.

    Raises:
        UserError: The folder has no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ext.hf.configs import load_config
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, MoE

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a Hugging Face folder, as it has no config.json. Choose another one."
        )
    is_expert_threshold = f'"{OWN.name}"' in (folder / "config.json").read_text()
    config = load_config(folder) if is_expert_threshold else AutoConfig.from_pretrained(folder)
    # A train step must compute the same as `log_probs`: with dropout, the ratios of PPO would
    # not be 1 before the first update. Training in eval mode is no alternative, because experts
    # without a token then take no part and ranks would lack each other's gradients.
    _turn_dropout_off(config)
    loader = ExpertThresholdForCausalLM if is_expert_threshold else AutoModelForCausalLM
    model = loader.from_pretrained(folder, config=config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, _DropoutNd):  # also rates that the configuration does not have
            module.p = 0.0
    if is_expert_threshold:
        # The tokens decide which experts run, so ZeRO 3 must fetch all experts of a layer together.
        deepspeed.utils.set_z3_leaf_modules(model, [MoE], raise_if_not_found=False)
    return model


def check_samples_per_row(config: Any) -> None:
    """Refuse a model that would mix the samples of a row.

    Args:
        config: Configuration of the model in transformers.

    Raises:
        UserError: The model has linear attention, which no mask keeps within a sample.
    """
    if "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise UserError(
            "Several samples per row of a model with linear attention (layer_types in "
            "config.json) are not supported by the DeepSpeed engine, which would mix them. "
            "Use the Megatron engine."
        )


def _turn_dropout_off(config: Any) -> None:
    """Set all dropout rates to 0, before modules other than torch.nn.Dropout copy them."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _turn_dropout_off(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and "drop" in name:
            setattr(config, name, 0.0)


def read_end_tokens(folder: Path) -> frozenset[int]:
    """Return the end tokens of a model, whose folder may lack a tokenizer."""
    with_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder) if with_tokenizer else SimpleNamespace()
    record_end_tokens(tokenizer, folder)
    return end_tokens(tokenizer)


def wrap(
    model: Any, optimization: Optimization | None, zero: ZeroSettings, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Return DeepSpeed's engine of a model, and its optimizer, None for a model not trained."""
    optimizer = None
    if optimization is not None:
        groups = _parameter_groups(model, optimization)
        optimizer = torch.optim.AdamW(
            groups, betas=optimization.betas, eps=optimization.eps, lr=0.0
        )
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=_config(optimization, zero, dtype),
        dist_init_required=False,
    )
    return engine, optimizer


def _config(
    optimization: Optimization | None, zero: ZeroSettings, dtype: torch.dtype
) -> dict[str, Any]:
    trained = optimization is not None
    # Without an optimizer, only parameters can be divided.
    settings: dict[str, Any] = {"stage": zero.stage if trained or zero.stage == 3 else 0}
    if zero.offload_optimizer and trained:
        settings["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_parameters:
        settings["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": zero.micro_batch,
        # `train_step` sets the boundaries. With 1, offloading loses all but the last part.
        "gradient_accumulation_steps": 2,
        "zero_optimization": settings,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": optimization.clip if optimization else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def _parameter_groups(model: Any, optimization: Optimization) -> list[dict[str, Any]]:
    """Return parameters with and without weight decay, for the optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": params, "weight_decay": decay}
        for params, decay in (
            ([p for p in trained if p.dim() > 1], optimization.weight_decay),
            ([p for p in trained if p.dim() <= 1], 0.0),
        )
        if params
    ]
