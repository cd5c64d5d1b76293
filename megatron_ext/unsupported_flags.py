"""Flags of Megatron that this project does not support, or that need a GPU or a package.

Megatron accepts them, and the run would end in a stack trace: when the model, the optimizer or the
process groups are built, or at a later step.
"""

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError

_LEAVE_OUT = "Leave it out."
_PATTERN = "Use --hybrid-layer-pattern."

# Values that are not supported, and the advice. None stands for any value that is not 0 or empty.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        ("multi_latent_attention", "heterogeneous_layers_config_path", "mtp_standalone",
         "mtp_use_repeated_layer", "mtp_detach_heads",
         "cpu_offloading_num_layers", "defer_embedding_wgrad_compute", "fp8_output_proj",
         "overlap_moe_expert_parallel_comm", "lazy_mpu_init", "test_mode",
         "save_activations_interval", "save_wgrads_interval", "save_dgrads_interval",
         "tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards",
         "fault_injector_ranks", "fault_injector_num_ranks", "error_injection_rate"),
        (None, _LEAVE_OUT),
    ),
    **dict.fromkeys(
        ("hybrid_override_pattern", "mtp_hybrid_override_pattern"),
        (None, _PATTERN),
    ),
    "experimental_attention_variant": ("dsa", "Use gated_delta_net, or leave it out."),
    "use_mamba_mem_eff_path": (False, _LEAVE_OUT),
    "rl_profile": (None, "Use et-align train-policy for reinforcement learning."),
    "moe_use_upcycling": (None, "Use python -m tools.upcycle."),
    "init_method_xavier_uniform": (None, "Use --init-method-std or --et-init."),
    "pad_vocab_size": (False, "Use --make-vocab-size-divisible-by 1."),
    "dataloader_type": ("external", "Use single or cyclic."),
    "rerun_mode": ("report_stats", "Use disabled or validate_results."),
    "transformer_impl": ("inference_optimized", "Use local for training."),
}  # fmt: skip
_UNSUPPORTED_OPTIMIZERS = ("soap", "adaptive_muon")
_UNSUPPORTED_TOKENIZERS = ("MultimodalTokenizer", "NullMultimodalTokenizer")

# Flags for which Megatron calls CUDA or NCCL, and the value that does not.
_NEEDS_GPU: dict[str, Any] = {
    "distributed_backend": "gloo",
    "pipeline_model_parallel_comm_backend": None,
    "record_memory_history": False,
    "optimizer_cuda_graph": False,
    "use_sharp": False,
    "nccl_ub": False,
    "log_device_memory_used": False,
    "log_straggler": False,
    "gpu_sniff_test_interval": None,
}

_NEEDS_PACKAGE = {
    "use_grouped_gemm_for_shared_expert": ("transformer_engine", "transformer-engine"),
    "log_device_memory_used": ("pynvml", "nvidia-ml-py"),
    "mamba_training_ssm_states_dtype": ("mamba_ssm", "mamba-ssm"),
    "log_straggler": ("pynvml", "nvidia-ml-py"),
    "enable_ft_package": ("nvidia_resiliency_ext", "nvidia-resiliency-ext"),
}

# Data types that are fp32 without the optimizer that is aware of the precision.
_PRECISION_AWARE = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_ROTARY = ("rope", "yarn", "mrope")


def check_unsupported(args: Namespace) -> None:
    """Refuse flags that Megatron accepts and this project, device or environment does not support.

    Args:
        args: Arguments as parsed, before Megatron's validation.

    Raises:
        UserError: The message names the flag and what to do.
    """
    for name, (refused, advice) in _UNSUPPORTED.items():
        value = getattr(args, name, None)
        if value == refused if refused is not None else value:
            is_choice = refused is not None and isinstance(value, str)
            text = f"{_flag(name)} {value}" if is_choice else _flag(name)
            raise UserError(f"{text} is not supported by this project. {advice}")
    if args.optimizer in _UNSUPPORTED_OPTIMIZERS:
        raise UserError(
            f"--optimizer {args.optimizer} is not supported by this project. Use adam or muon."
        )
    if args.tokenizer_type in _UNSUPPORTED_TOKENIZERS:
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} is not supported by this project. Use "
            "HuggingFaceTokenizer or SentencePieceTokenizer."
        )
    if is_cpu_device() and getattr(args, "dry_run", None) is None:  # it replaces the device's flags
        for name, harmless in _NEEDS_GPU.items():
            value = getattr(args, name, harmless)
            if value != harmless:
                text = f"{_flag(name)} {value}" if isinstance(value, str) else _flag(name)
                raise UserError(f"{text} needs a GPU. {_LEAVE_OUT}")
    for name, (module, package) in _NEEDS_PACKAGE.items():
        if getattr(args, name, False) and find_spec(module) is None:
            raise UserError(
                f"{_flag(name)} needs the package {package}. Install it, or leave it out."
            )
    if getattr(args, "sharp_enabled_group", None) and not args.use_sharp:
        raise UserError(
            f"--sharp-enabled-group {args.sharp_enabled_group} needs --use-sharp. Add it."
        )
    for name in ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"):
        if getattr(args, name, False) and not args.data_cache_path:
            raise UserError(f"{_flag(name)} needs --data-cache-path. Add it.")
    _check_precision(args)
    _check_rotary(args)
    if args.num_experts:
        _check_expert_biases(args)


def _check_precision(args: Namespace) -> None:
    """Refuse data types of the optimizer that only the precision-aware one has."""
    if getattr(args, "use_precision_aware_optimizer", False):
        return
    for name in _PRECISION_AWARE:
        value = str(getattr(args, name, "fp32")).removeprefix("torch.")
        if value not in ("fp32", "float32"):
            raise UserError(
                f"{_flag(name)} {value} needs --use-precision-aware-optimizer, which needs "
                "the package transformer-engine and a GPU. Add it, or leave this flag out."
            )


def _check_rotary(args: Namespace) -> None:
    """Refuse an odd size of heads, whose positions cannot be rotated in pairs."""
    if getattr(args, "position_embedding_type", None) not in _ROTARY or not args.hidden_size:
        return
    size = args.kv_channels or args.hidden_size // (args.num_attention_heads or 1)
    if size % 2 and int(size * args.rotary_percent) == size:
        source = (
            f"--kv-channels {size}"
            if args.kv_channels
            else f"--hidden-size {args.hidden_size} with --num-attention-heads "
            f"{args.num_attention_heads} makes heads of {size}, which"
        )
        raise UserError(
            f"{source} is odd, and --position-embedding-type {args.position_embedding_type} "
            "rotates pairs. Choose an even size with --kv-channels."
        )


def _check_expert_biases(args: Namespace) -> None:
    """Refuse biases of experts, which Megatron supports for inference or not at all."""
    if not args.add_bias_linear:
        return
    if args.moe_shared_expert_intermediate_size:
        raise UserError(
            "--moe-shared-expert-intermediate-size is incompatible with biases of linear layers. "
            "Add --disable-bias-linear."
        )
    if args.transformer_impl == "local":
        raise UserError(
            "--num-experts is incompatible with biases of linear layers in --transformer-impl "
            "local. Add --disable-bias-linear."
        )


def _flag(name: str) -> str:
    """Return the flag of an argument."""
    if name in ("pad_vocab_size", "use_mamba_mem_eff_path"):
        return "--disable-" + name.removeprefix("use_").replace("_", "-")
    return "--use-nccl-ub" if name == "nccl_ub" else "--" + name.replace("_", "-")
