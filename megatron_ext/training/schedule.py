"""Schedules that follow the progress of a run.

Megatron counts schedules of the learning rate and of weight decay in samples, but turns a number of
steps into samples by the batch size of the current command line; see `RunProgress`.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.training import get_args

from megatron_ext import patches
from megatron_ext.training.run_progress import RunProgress
from megatron_ext.training.trainer import TrainerHooks


def replacements(hooks: TrainerHooks) -> dict[str, Callable[..., Any]]:
    """Return Megatron's functions that count steps and samples, following the run's progress.

    Args:
        hooks: Parts of the run; its progress is that at the start.
    """
    progress = hooks.progress

    def wrapped(name: str, wrapper: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        target = f"megatron.training.training.{name}"
        return {target: wrapper(patches.original(target), progress)}

    return {
        "megatron.training.training.update_train_iters": partial(
            _set_train_iters, progress=progress
        ),
        **wrapped("get_optimizer_param_scheduler", _wrap_scheduler),
        **wrapped("setup_model_and_optimizer", _wrap_setup),
        **wrapped("get_train_valid_test_num_samples", _wrap_sample_counts),
    }


def arguments(args: Namespace) -> dict[str, Callable[[], Namespace]]:
    """Return a replacement for Megatron's access to its global arguments."""
    return {"megatron.training.training.get_args": lambda: args}


def _set_train_iters(args: Namespace, progress: RunProgress) -> None:
    """Convert `--train-samples` into a number of steps, including those already done."""
    args.train_iters = progress.last_step(args)


def _wrap_scheduler(build: Callable[[Any], Any], progress: RunProgress) -> Callable[[Any], Any]:
    """Wrap Megatron's builder of the schedule so that steps are converted into their samples."""

    def wrapped(optimizer: Any) -> Any:
        args = get_args()
        if not args.train_iters:
            return build(optimizer)
        args.lr_decay_iters = args.lr_decay_iters or args.train_iters
        by_samples = copy.copy(args)
        by_samples.train_iters = None
        by_samples.train_samples = progress.samples_after(args.train_iters)
        by_samples.lr_decay_samples = decay = progress.samples_after(args.lr_decay_iters)
        by_samples.lr_warmup_samples = progress.samples_after(args.lr_warmup_iters)
        if args.lr_wsd_decay_iters is not None:
            begin = max(0, args.lr_decay_iters - args.lr_wsd_decay_iters)
            by_samples.lr_wsd_decay_samples = decay - progress.samples_after(begin)
        with patches.applied("schedule", by_samples):
            return build(optimizer)

    return wrapped


def _wrap_setup(set_up: Callable[..., Any], progress: RunProgress) -> Callable[..., Any]:
    """Wrap Megatron's set-up so that a new schedule starts at the progress of the run."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = set_up(*args, **kwargs)
        if scheduler is not None and get_args().no_load_optim:
            scheduler.step(progress.samples - scheduler.num_steps)
        return model, optimizer, scheduler

    return wrapped


def _wrap_sample_counts(
    count: Callable[[], Sequence[Any]], progress: RunProgress
) -> Callable[[], tuple[Any, Any, Any]]:
    """Wrap Megatron's sizes of the datasets so that they cover all that a resumed run reads."""

    def wrapped() -> tuple[Any, Any, Any]:
        args = get_args()
        train, valid, test = count()
        if not args.phase_transition_iterations and not args.skip_train:
            train = args.train_samples or progress.samples_after(args.train_iters)
            # A run of which only the evaluation is left still opens its training data.
            train = max(train, progress.samples + args.global_batch_size)
        if valid is not None and not args.skip_train:
            interval = args.eval_interval
            first = max(args.iteration, (args.start_eval_at_iter or 1) - 1)
            evaluations = max(0, args.train_iters // interval - first // interval) + 1
            read = evaluations * args.eval_iters * args.eval_global_batch_size
            valid = max(valid, args.consumed_valid_samples + read)
        return train, valid, test

    return wrapped
