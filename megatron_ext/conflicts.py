"""Checks of flags that contradict each other or have no effect."""

from argparse import Namespace
from collections.abc import Set
from importlib.util import find_spec

from megatron_ext.errors import UserError
from megatron_ext.moe.registry import router_type, routing_flags

_MUON_FLAGS = (
    "muon_embedding_lr",
    "muon_head_lr",
    "muon_router",
    "muon_momentum_warmup_iters",
    "muon_reference_width",
)

# Settings that Megatron's Muon fails on or ignores: a harmless value and the advice.
_NOT_WITH_MUON = {
    "fp16": (False, "Use --bf16."),
    "decoupled_lr": (None, "Use --muon-embedding-lr and --muon-head-lr."),
    "decoupled_min_lr": (
        None,
        "Leave it out: every learning rate decays to the same fraction of its peak.",
    ),
    "use_mup": (False, "Use --muon-reference-width, which scales learning rates by width."),
    "optimizer_cpu_offload": (False, "Leave it out: matrices stay on the device."),
    "use_precision_aware_optimizer": (False, "Leave it out: the state is fp32."),
    "moe_single_grouped_weight": (False, "Leave it out: Muon needs a matrix for each expert."),
    "overlap_param_gather_with_optimizer_step": (False, "Use --overlap-param-gather alone."),
    "num_distributed_optimizer_instances": (1, "Leave it out: Muon supports one instance."),
    "distrib_optim_fully_reshardable_mem_efficient": (
        False,
        "Leave it out: Muon gathers on devices.",
    ),
    "use_layer_wise_param_layout": (True, "Leave it out: such checkpoints could not be resumed."),
}


def check_conflicts(args: Namespace, explicit: Set[str]) -> list[str]:
    """Refuse flags that contradict each other, and turn off a fusion without a kernel.

    Args:
        args: Arguments as parsed, before Megatron's validation. `bias_gelu_fusion` may change.
        explicit: Names of the arguments that the command line or a recipe sets.

    Returns:
        A warning for each flag that has no effect.

    Raises:
        UserError: Two flags contradict each other; the message names both and what to do.
    """
    if args.train_iters and args.train_samples:
        raise UserError(
            f"--train-iters {args.train_iters} and --train-samples {args.train_samples} both set "
            "the length of training. Use one of them."
        )
    if args.mtp_num_layers:
        _check_multi_token_prediction(args)
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 both set the precision. Use one of them.")
    if args.tokenizer_type == "NullTokenizer" and not args.vocab_size:
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size of at least 1. Add it.")
    if not args.skip_train:
        _check_steps(args)
    pattern, layers = args.moe_layer_freq, args.num_layers
    if isinstance(pattern, list) and layers is not None and len(pattern) != layers:
        raise UserError(
            f"--moe-layer-freq is a list of {len(pattern)}, but --num-layers is {layers}. Use one "
            "number for each layer."
        )
    _check_linear_attention(args)
    if find_spec("transformer_engine") is None:
        _check_without_transformer_engine(args)
    if args.ckpt_format != "torch_dist":
        raise UserError(
            f"--ckpt-format {args.ckpt_format} is not supported. Leave it out or use torch_dist."
        )
    if args.num_experts:
        _check_replaced(args, explicit)
    if args.optimizer == "dist_muon":
        raise UserError(
            "--optimizer dist_muon is Megatron's old name of --optimizer muon with "
            "--use-distributed-optimizer. Use these flags."
        )
    if args.optimizer == "muon":
        _check_muon(args)
    return _without_effect(args, explicit) + _turn_off_gelu_fusion(args)


def _check_multi_token_prediction(args: Namespace) -> None:
    """Refuse what would change the loss of a depth, or end in a stack trace."""
    name = f"--mtp-num-layers {args.mtp_num_layers}"
    if args.context_parallel_size > 1 and args.calculate_per_token_loss:
        raise UserError(
            f"{name} with --context-parallel-size {args.context_parallel_size} is incompatible "
            "with --calculate-per-token-loss: each rank would weight the loss of a depth by its "
            "own tokens. Leave --calculate-per-token-loss out."
        )
    if args.pipeline_model_parallel_layout:
        raise UserError(
            f"{name} is incompatible with --pipeline-model-parallel-layout: the depths are on the "
            "last stage. Leave the layout out."
        )
    if args.recompute_granularity == "full" and (
        args.recompute_method != "uniform" or args.recompute_num_layers != 1
    ):
        raise UserError(
            f"{name} with --recompute-granularity full requires --recompute-method uniform and "
            "--recompute-num-layers 1. Change them."
        )


def _check_linear_attention(args: Namespace) -> None:
    """Refuse flags that do not say which layers are Gated DeltaNet layers."""
    variant, pattern = args.experimental_attention_variant, args.linear_attention_freq
    if (variant is None) != (pattern is None):
        flags = ("--linear-attention-freq", "--experimental-attention-variant gated_delta_net")
        present, missing = flags if variant is None else flags[::-1]
        raise UserError(
            f"{present} requires {missing}. Add it, or use --hybrid-layer-pattern in place of both."
        )
    if isinstance(pattern, int) and pattern < 1:
        raise UserError(
            f"--linear-attention-freq {pattern} must be at least 1. Use n for attention in every "
            "n-th layer."
        )
    layers = args.num_layers
    if isinstance(pattern, list) and layers is not None and len(pattern) != layers:
        raise UserError(
            f"--linear-attention-freq is a list of {len(pattern)}, but --num-layers is {layers}. "
            "Use one number for each layer."
        )
    scales = variant is not None and args.et_norm_scale and not args.sequence_parallel
    if scales and (tensor := args.tensor_model_parallel_size) > 1:
        raise UserError(
            f"--et-norm-scale with Gated DeltaNet layers and --tensor-model-parallel-size {tensor} "
            "requires --sequence-parallel, without which the gradients of a norm's scale are not "
            "summed. Add --sequence-parallel."
        )


def _turn_off_gelu_fusion(args: Namespace) -> list[str]:
    """Turn off Megatron's default fusion of bias and GELU where it fails, and return a warning."""
    if not args.bias_gelu_fusion or args.swiglu or args.quick_geglu:  # which have other fusions
        return []
    reasons = {
        "--squared-relu": args.squared_relu,
        "--disable-bias-linear": not args.add_bias_linear,
        "--num-experts": args.num_experts,
    }
    for flag, reason in reasons.items():
        if reason:
            args.bias_gelu_fusion = False
            return [
                f"{flag} turns the fusion of bias and GELU off; --no-bias-gelu-fusion says so "
                "without this warning"
            ]
    return []


def _check_steps(args: Namespace) -> None:
    """Refuse numbers of steps that Megatron refuses only after it has built the model."""
    if args.eval_interval < 1:
        raise UserError(
            f"--eval-interval {args.eval_interval} must be at least 1. Use --eval-iters 0 to train "
            "without validation."
        )
    if not args.train_iters and not args.train_samples:
        raise UserError("Nothing to train. Give --train-iters of at least 1.")
    for unit in ("iters", "samples"):
        total = f"lr_decay_{unit}"
        if getattr(args, total) is None:
            total = f"train_{unit}"
        warmup, steps = getattr(args, f"lr_warmup_{unit}"), getattr(args, total)
        if steps is not None and steps <= (warmup or 0):
            raise UserError(
                f"--lr-warmup-{unit} {warmup or 0} must be below {_flag(total)} {steps}. Lower the "
                "one or raise the other."
            )


def _check_without_transformer_engine(args: Namespace) -> None:
    """Refuse flags that need Transformer Engine."""
    if args.transformer_impl == "transformer_engine":
        raise UserError(
            "--transformer-impl transformer_engine needs the package transformer-engine and a GPU. "
            "Install it, or use local."
        )
    if args.use_precision_aware_optimizer:
        raise UserError(
            "--use-precision-aware-optimizer needs the package transformer-engine and a GPU. "
            "Install it, or leave the flag out."
        )
    if "gdn_norm_out" in (args.recompute_modules or ()):
        raise UserError(
            "--recompute-modules gdn_norm_out needs the package transformer-engine and a GPU. "
            "Install it, or leave gdn_norm_out out."
        )


def _check_replaced(args: Namespace, explicit: Set[str]) -> None:
    """Refuse settings of Megatron's router that the router of the run replaces."""
    for name, (harmless, why) in router_type(args.router_type).replaced.items():
        value = getattr(args, name, None)
        if name in explicit and value not in harmless:
            raise UserError(
                f"{_flag(name)} is incompatible with --router-type {args.router_type}: {why}. "
                "Leave it out, or use --router-type token-choice."
            )


def _check_muon(args: Namespace) -> None:
    """Refuse flags that are incompatible with Muon, and values outside of their range."""
    for name, (harmless, advice) in _NOT_WITH_MUON.items():
        if getattr(args, name, harmless) != harmless:
            flag = "no_use_layer_wise_param_layout" if harmless is True else name
            raise UserError(f"{_flag(flag)} is incompatible with --optimizer muon. {advice}")
    expert_biases = args.add_bias_linear and args.num_experts
    if expert_biases and args.use_distributed_optimizer and args.expert_model_parallel_size > 1:
        raise UserError(
            "--optimizer muon with --use-distributed-optimizer and "
            "--expert-model-parallel-size above 1 does not support biases of experts. Add "
            "--disable-bias-linear."
        )
    for name in ("lr", "muon_embedding_lr", "muon_head_lr", "muon_reference_width"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"{_flag(name)} {value:g} must be above 0 with --optimizer muon.")
    if args.muon_momentum_warmup_iters < 0:
        raise UserError(
            f"--muon-momentum-warmup-iters {args.muon_momentum_warmup_iters} must not be negative."
        )
    if not 0 <= args.muon_momentum < 1:
        raise UserError(f"--muon-momentum {args.muon_momentum:g} must be in [0, 1).")


def _without_effect(args: Namespace, explicit: Set[str]) -> list[str]:
    """Return a warning for each explicit flag that has no effect."""
    unused: dict[str, str] = {}
    router = router_type(args.router_type)
    if not args.num_experts:
        unused = dict.fromkeys(sorted(routing_flags()), "a model without --num-experts")
    else:
        ignored = sorted(routing_flags() - router.flags)
        unused = dict.fromkeys(ignored, f"--router-type {args.router_type}")
        if args.et_capacity is None:
            unused = {"et_capacity_pool": "--et-capacity none"} | unused
        if args.et_threshold_estimator != "ema":
            estimator = f"--et-threshold-estimator {args.et_threshold_estimator}"
            unused = {"et_ema_decay": estimator} | unused
    if args.optimizer != "muon":
        unused |= dict.fromkeys(_MUON_FLAGS, f"--optimizer {args.optimizer}")
    elif not args.num_experts:
        unused["muon_router"] = "a model without --num-experts"
    warnings = [
        f"{_flag(name)} has no effect with {why}"
        for name, why in unused.items()
        if name in explicit
    ]
    steps, warmup = args.train_iters, args.et_warmup_iters
    length = f"--train-iters {steps}"
    if not steps and args.train_samples and getattr(args, "global_batch_size", None):
        steps = args.train_samples // args.global_batch_size
        length = f"the {steps} steps of --train-samples {args.train_samples}"
    by_threshold = args.num_experts and router.trains_by_threshold
    if by_threshold and steps and warmup >= steps:
        warnings.append(
            f"--et-warmup-iters {warmup} is not below {length}: every step routes by "
            "expert choice and none by thresholds"
        )
    return warnings


def _flag(name: str) -> str:
    """Return the flag of an argument."""
    return "--" + name.replace("_", "-")
