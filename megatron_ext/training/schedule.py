"""Progress of a run in samples and tokens, and schedules that follow it.

Megatron counts schedules of the learning rate and of weight decay in samples, but turns a number of
steps into samples by the batch size of the current command line. That holds only while the batch
size never changes. Here the batch sizes of earlier steps come from the checkpoint, and those of
later steps from the flags.
"""

import copy
from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    update_num_microbatches,
)
from megatron.training import get_args

from megatron_ext import patches
from megatron_ext.checkpoint import read_common_state
from megatron_ext.training.launch import Launch

if TYPE_CHECKING:
    from megatron_ext.training.trainer import TrainerHooks


@dataclass
class RunProgress:
    """Progress of the training of a run, as its checkpoint records it.

    Attributes:
        iteration: Number of optimizer steps.
        samples: Number of sequences.
        tokens: Number of tokens, including steps with another sequence length.
        validation_samples: Number of validation sequences that evaluations have read.
        history: Pairs of iteration and samples at which the batch size changed, the first `[0, 0]`.
            Between two of them all steps had the same number of samples.
    """

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    validation_samples: int = 0
    history: list[list[int]] = field(default_factory=lambda: [[0, 0]])

    @classmethod
    def read(cls, checkpoint: Path | None, args: Namespace) -> "RunProgress":
        """Return the progress with which training from a checkpoint starts.

        Args:
            checkpoint: Folder of the iteration to resume from, or None.
            args: Arguments of this run, where `--finetune` starts at 0.
        """
        if checkpoint is None or args.finetune:
            return cls()
        state = read_common_state(checkpoint)
        saved = state["args"]
        iteration = 0 if checkpoint.name == "release" else int(state.get("iteration") or 0)
        samples = int(getattr(saved, "consumed_train_samples", 0))
        if samples == 0:  # not recorded: Megatron assumes the same
            samples = iteration * getattr(saved, "global_batch_size", 0)
        history = [list(corner) for corner in getattr(saved, "batch_history", [[0, 0]])]
        if history[-1][0] < iteration:
            history.append([iteration, samples])
        return cls(
            iteration=iteration,
            samples=samples,
            tokens=int(getattr(saved, "trained_tokens", samples * getattr(saved, "seq_length", 0))),
            validation_samples=int(getattr(saved, "consumed_valid_samples", 0)),
            history=history,
        )

    @classmethod
    def share(cls, checkpoint: Path | None, args: Namespace, launch: Launch) -> "RunProgress":
        """Read the progress on rank 0 and return it on every rank."""
        progress = cls.read(checkpoint, args) if launch.rank == 0 else cls()
        return cls(**launch.share("progress", asdict(progress)))

    def record_in(self, args: Namespace) -> None:
        """Store the tokens and batch sizes so far in the arguments, which checkpoints contain."""
        args.trained_tokens, args.batch_history = self.tokens, self.history

    def finished(self, args: Namespace) -> bool:
        """Return whether no step is left to train."""
        if args.skip_train or self.iteration == 0:
            return False
        if args.train_iters:
            return self.iteration >= args.train_iters
        return self.samples + _batch_size(self.samples) > args.train_samples

    def samples_after(self, step: int) -> int:
        """Return the number of samples that the run has trained on after a step, past or future."""
        if step < self.iteration:
            last = bisect_right(self.history, step, key=lambda corner: corner[0]) - 1
            (begin, before), (end, after) = self.history[last : last + 2]
            return before + (after - before) * (step - begin) // (end - begin)
        samples, remaining = self.samples, step - self.iteration
        if get_args().step_batch_size_schedule is None:
            return samples + remaining * _batch_size(samples)
        for _ in range(remaining):
            samples += _batch_size(samples)
        return samples


def _batch_size(samples: int) -> int:
    """Return the size of the batch that follows so many samples."""
    update_num_microbatches(samples, consistency_check=False)
    size = get_current_running_global_batch_size()
    update_num_microbatches(0, consistency_check=False)  # as Megatron initializes it
    return size


def record_step(args: Namespace, iteration: int, batch_size: int) -> None:
    """Record the tokens and the batch size of a finished step in the arguments.

    Checkpoints contain the arguments.

    Args:
        args: Megatron's arguments, with `consumed_train_samples` after the step.
        iteration: Number of the step, from 1.
        batch_size: Sequences of the step.
    """
    args.trained_tokens += batch_size * args.seq_length
    if batch_size != getattr(args, "last_batch_size", batch_size):
        begin = [iteration - 1, args.consumed_train_samples - batch_size]
        if args.batch_history[-1] != begin:
            args.batch_history.append(begin)
    args.last_batch_size = batch_size


def replacements(hooks: "TrainerHooks") -> dict[str, Callable[..., Any]]:
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
    if args.train_iters:
        return
    samples, iteration = progress.samples, progress.iteration
    if args.step_batch_size_schedule is None:
        iteration += max(0, args.train_samples - samples) // _batch_size(samples)
    else:
        while samples < args.train_samples:
            samples += _batch_size(samples)
            iteration += 1
    args.train_iters = iteration


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
