"""Comparison of the flags of a run with the checkpoint from which it resumes."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import read_common_state
from megatron_ext.config import ETConfig
from megatron_ext.console import console
from megatron_ext.data.tokenizer_identity import check_model_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.model.identity import check_same_model, check_same_schedule
from megatron_ext.moe.registry import ROUTERS, router_type
from megatron_ext.training.blends import SOURCES
from megatron_ext.training.resharding import check_resharding

# Settings that the learning rate schedule of a resumed run must share with the checkpoint.
_SAME_SCHEDULE = (
    "train_iters",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "train_samples",
    "lr_decay_samples",
    "lr_warmup_samples",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "step_batch_size_schedule",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
    "muon_embedding_lr",
    "muon_head_lr",
    "muon_reference_width",
    "muon_momentum_warmup_iters",
)


# Other settings of the optimizer that a resumed run must share with the checkpoint.
_SAME_OPTIMIZER = (
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
    "muon_momentum",
    "clip_grad",
)


def check_resuming(checkpoint: Path, args: Namespace, config: ETConfig) -> None:
    """Compare the flags with those of the checkpoint that training would resume from."""
    saved = read_common_state(checkpoint)["args"]
    had_thresholds = (
        saved.num_experts is not None and router_type(saved.router_type).uses_thresholds
    )
    if config.uses_thresholds != had_thresholds and saved.router_type != args.router_type:
        sharing = " and ".join(name for name, kind in ROUTERS.items() if kind.uses_thresholds)
        raise UserError(
            f"{checkpoint} was trained with --router-type {saved.router_type} and cannot continue "
            f"as {args.router_type}: only {sharing} share thresholds."
        )
    check_resharding(checkpoint, saved, args)
    check_same_model(checkpoint, saved, args)
    # A converted checkpoint has only weights, and --finetune loads only weights.
    weights_only = args.finetune or getattr(saved, "no_save_optim", False)
    flags_decide = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if not (weights_only or flags_decide):
        for name in _SAME_SCHEDULE:
            current, previous = (_schedule_setting(a, name) for a in (args, saved))
            if current != previous and hasattr(saved, name):  # older checkpoints have fewer flags
                raise UserError(
                    f"{checkpoint} was trained with {name} = {previous}, but the flags say "
                    f"{current}. Use --override-opt-param-scheduler to resume with the flags, or "
                    "--use-checkpoint-opt-param-scheduler to keep the checkpoint's schedule."
                )
    if not (weights_only or args.override_opt_param_scheduler or args.skip_train):
        check_same_schedule(checkpoint, saved, args)
        for name in () if args.no_load_optim else _SAME_OPTIMIZER:
            current, previous = getattr(args, name), getattr(saved, name, getattr(args, name))
            if current != previous:
                raise UserError(
                    f"{checkpoint} was trained with {name} = {previous}, but the flags say "
                    f"{current}. Make them equal, or use --override-opt-param-scheduler to train "
                    "with the flags."
                )
    check_model_tokenizer(checkpoint, saved, args)
    if not weights_only and _has_changed_data(saved, args):
        console.warn(
            f"warning: the datasets have changed since {checkpoint}. Training continues at its "
            "position in the new order of samples, so that documents can be read twice or never."
        )


def _has_changed_data(saved: Namespace, args: Namespace) -> bool:
    """Return whether the same flags name data with another content than in the checkpoint."""
    content = [getattr(each, "data_sha256", None) for each in (args, saved)]
    same = all(getattr(saved, name, None) == getattr(args, name) for name in (*SOURCES, "split"))
    return None not in content and content[0] != content[1] and same


def _schedule_setting(args: Namespace, name: str) -> Any:
    """Return a setting of the learning rate schedule, or Megatron's default for it.

    Megatron stores the steps that it derives from `--train-samples` in the arguments of a run, and
    thus in its checkpoints, although no flag sets them.
    """
    samples = getattr(args, "train_samples", None)
    if samples and name in ("train_iters", "lr_decay_iters"):
        return None
    defaults = {"lr_decay_iters": args.train_iters, "lr_decay_samples": samples}
    value = getattr(args, name, None)
    return defaults.get(name) if value is None else value
