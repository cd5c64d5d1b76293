"""Checks of the ranges of flags that Megatron does not check when it parses them.

Without these checks a value outside of its range ends a run with a stack trace: when the model, the
optimizer or the data are built, at the first step that logs or saves, or at the end of training.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_ext.errors import UserError
from megatron_ext.planning.layout import run_sizes

_Range = tuple[Callable[[Any], bool], str]
_NOT_NEGATIVE: _Range = (lambda value: value >= 0, "must not be negative")
_POSITIVE: _Range = (lambda value: value > 0, "must be above 0")
_AT_LEAST_1: _Range = (lambda value: value >= 1, "must be at least 1")
_BELOW_1: _Range = (lambda value: 0 <= value < 1, "must be in [0, 1)")

_RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        ("weight_decay", "start_weight_decay", "end_weight_decay", "lr", "min_lr", "clip_grad",
         "decoupled_lr", "decoupled_min_lr", "lr_warmup_init", "lr_warmup_iters",
         "lr_warmup_samples", "adam_eps", "init_method_std", "num_workers", "eval_iters",
         "train_iters", "train_samples", "exit_duration_in_mins", "start_eval_at_iter",
         "moe_z_loss_coeff", "moe_input_jitter_eps", "mid_level_dataset_surplus"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("layernorm_epsilon", "rotary_base", "distributed_timeout_minutes",
         "loss_scale", "initial_loss_scale", "min_loss_scale"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
         "eval_global_batch_size", "eval_micro_batch_size", "make_vocab_size_divisible_by",
         "vocab_size", "recompute_num_layers", "num_dataset_builder_threads", "loss_scale_window",
         "hysteresis", "kv_channels", "tensorboard_queue_size", "dist_ckpt_workers",
         "moe_layer_freq", "hidden_size", "rotary_seq_len_interpolation_factor"),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "sgd_momentum",
         "lr_warmup_fraction"),
        _BELOW_1,
    ),
    "rotary_percent": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
    "seed": (lambda value: 1 <= value < 2**32, "must be at least 1 and below 2 ** 32"),
}  # fmt: skip

# Intervals for which 0 means never. Megatron divides by all others.
_OFF_AT_0 = {
    "exit_interval",
    "manual_gc_interval",
    "train_sync_interval",
    "non_persistent_save_interval",
    "inference_logging_step_interval",
}


def check_ranges(args: Namespace, ranks: int) -> None:
    """Refuse values outside of their range, and schedules that cannot be computed.

    Args:
        args: Arguments as parsed, before Megatron's validation.
        ranks: World size.

    Raises:
        UserError: The message names the flag, its value and its range.
    """
    for name, value in vars(args).items():
        infinite = name in _RANGES and isinstance(value, float) and math.isinf(value)
        if isinstance(value, float) and (math.isnan(value) or infinite):
            raise UserError(f"{_flag(name)} {value:g} is not a finite number. Choose a finite one.")
        if name in _RANGES:
            _check(name, value, *_RANGES[name])
        elif name.endswith("_interval"):
            steps = _NOT_NEGATIVE if name in _OFF_AT_0 else _AT_LEAST_1
            _check(name, value, *(_POSITIVE if isinstance(value, float) else steps))
    _check_batch_schedule(args, ranks)
    if not args.skip_train:
        _check_learning_rate(args)
        _check_weight_decay(args)
    if args.phase_transition_iterations:
        _check_phases(args)
    instances = args.num_distributed_optimizer_instances
    if instances != 1:
        sizes = run_sizes(args, ranks)
        if instances < 1 or (sizes.data * sizes.context) % instances:
            raise UserError(
                f"--num-distributed-optimizer-instances {instances} does not divide the "
                f"{sizes.data * sizes.context} data-parallel ranks. Choose a divisor."
            )
    if args.multiple_validation_sets != args.full_validation:
        flags = ["--multiple-validation-sets", "--full-validation"]
        flag, needed = flags if args.multiple_validation_sets else reversed(flags)
        raise UserError(f"{flag} needs {needed} in this version of Megatron. Add it.")


def _check_phases(args: Namespace) -> None:
    """Refuse phase transitions that are not steps, or without `--train-samples`."""
    steps = [step.strip() for step in args.phase_transition_iterations.split(",")]
    flag = f"--phase-transition-iterations {args.phase_transition_iterations}"
    if not all(step.isdecimal() and int(step) > 0 for step in steps):
        raise UserError(f"{flag} must be numbers of steps, such as 1000,2000.")
    if not args.train_samples:
        raise UserError(f"{flag} requires --train-samples. Use it instead of --train-iters.")


def _check(name: str, value: Any, is_valid: Callable[[Any], bool], text: str) -> None:
    """Refuse the value of a flag that is not valid; `text` is the range in words."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_valid(value):
        raise UserError(f"{_flag(name)} {value:g} {text}.{_ADVICE.get(name, '')}")


_ADVICE = {
    "eval_interval": " Use --eval-iters 0 to train without validation.",
    "save_interval": " To save nothing, leave out --run-dir and --save.",
}


def _check_learning_rate(args: Namespace) -> None:
    """Refuse a missing learning rate, and limits above the peak."""
    if args.lr is None:
        if args.optimizer == "muon":
            return  # that of the paper
        raise UserError("The learning rate is missing. Add --lr.")
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(args, name) > args.lr:
            raise UserError(
                f"{_flag(name)} {getattr(args, name):g} must not be above --lr {args.lr:g}."
            )
    lowest, peak = args.decoupled_min_lr, args.decoupled_lr
    if lowest is not None and peak is not None and lowest > peak:
        raise UserError(f"--decoupled-min-lr {lowest:g} must not be above --decoupled-lr {peak:g}.")
    if args.lr_decay_style == "WSD":
        _check_annealing(args)


def _check_annealing(args: Namespace) -> None:
    """Refuse a WSD schedule whose decay is missing or longer than the schedule."""
    unit, other = ("iters", "samples") if args.train_iters else ("samples", "iters")
    steps = getattr(args, f"lr_wsd_decay_{unit}")
    if steps is None:
        value = getattr(args, f"lr_wsd_decay_{other}")
        instead = f" instead of --lr-wsd-decay-{other} {value}" if value is not None else ""
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}{instead}. Add it.")
    total = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") else f"train_{unit}"
    if steps > (getattr(args, total) or 0):
        raise UserError(
            f"--lr-wsd-decay-{unit} {steps} must not be above {_flag(total)} "
            f"{getattr(args, total)}."
        )


def _check_weight_decay(args: Namespace) -> None:
    """Refuse a schedule of the weight decay that is incomplete or decreases."""
    begin, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        if begin is not None or end is not None:
            raise UserError(
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear "
                "or cosine. Give it, or use --weight-decay."
            )
    elif begin is None or end is None:
        raise UserError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay "
            "and --end-weight-decay. Give both."
        )
    elif end < begin:
        raise UserError(
            f"--end-weight-decay {end:g} must not be below --start-weight-decay {begin:g}."
        )


def _check_batch_schedule(args: Namespace, ranks: int) -> None:
    """Refuse a schedule of the batch size that Megatron ignores or fails on during training."""
    if args.rampup_batch_size is not None:
        raise UserError(
            "--rampup-batch-size has no effect in this version of Megatron. Use "
            "--step-batch-size-schedule 'TOKENS:BATCH TOKENS:BATCH ...'."
        )
    schedule = args.step_batch_size_schedule
    if schedule is None:
        return
    flag = f"--step-batch-size-schedule {schedule!r}"
    if args.global_batch_size is not None:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} and {flag} both set the batch "
            "size. Use one of them."
        )
    if args.decrease_batch_size_if_needed:
        raise UserError(f"{flag} is incompatible with --decrease-batch-size-if-needed.")
    try:
        steps = batch_schedule(args)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{flag} must be pairs TOKENS:BATCH, such as '0:8 1M:16'.") from error
    if not steps or steps[0][0] != 0:
        raise UserError(f"{flag} must begin with 0:BATCH, the batch of the first step.")
    for (tokens, size), (later, larger) in pairwise(steps):
        if later <= tokens or larger < size:
            raise UserError(
                f"{flag}: numbers of tokens must be a sample apart and batches must not shrink."
            )
    data = run_sizes(args, ranks).data
    for _, size in steps:
        if size < 1 or size % ((args.micro_batch_size or 1) * data):
            raise UserError(
                f"{flag}: the batch of {size} samples is not divisible by --micro-batch-size "
                f"{args.micro_batch_size or 1} times {data} data-parallel ranks."
            )


def batch_schedule(args: Namespace) -> list[tuple[int, int]]:
    """Return the samples at which each batch size of `--step-batch-size-schedule` starts.

    Returns:
        Pairs of the number of samples and the batch size.
    """
    return StepBatchsizeNumMicroBatchesCalculator._parse_schedule(
        args.step_batch_size_schedule, args.seq_length
    )


def _flag(name: str) -> str:
    """Return the flag of an argument."""
    if name == "layernorm_epsilon":
        return "--norm-epsilon"
    return "--" + name.replace("_", "-")
