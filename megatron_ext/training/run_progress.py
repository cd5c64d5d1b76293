"""Progress of a run in samples and tokens.

Megatron turns a number of steps into samples by the batch size of the current command line. That
holds only while the batch size never changes. Here the batch sizes of earlier steps come from the
checkpoint, and those of later steps from the flags.
"""

from argparse import Namespace
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    update_num_microbatches,
)
from megatron.training import get_args

from megatron_ext.checkpoint import read_common_state
from megatron_ext.training.launch import Launch


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
        return self.samples + next_batch_size(self.samples) > args.train_samples

    def last_step(self, args: Namespace) -> int:
        """Return the number of steps of the whole run, by `--train-iters` or `--train-samples`."""
        if args.train_iters:
            return int(args.train_iters)
        samples, iteration = self.samples, self.iteration
        if args.step_batch_size_schedule is None:
            return iteration + max(0, args.train_samples - samples) // next_batch_size(samples)
        while samples < args.train_samples:
            samples += next_batch_size(samples)
            iteration += 1
        return iteration

    def samples_after(self, step: int) -> int:
        """Return the number of samples that the run has trained on after a step, past or future."""
        if step < self.iteration:
            last = bisect_right(self.history, step, key=lambda corner: corner[0]) - 1
            (begin, before), (end, after) = self.history[last : last + 2]
            return before + (after - before) * (step - begin) // (end - begin)
        samples, remaining = self.samples, step - self.iteration
        if get_args().step_batch_size_schedule is None:
            return samples + remaining * next_batch_size(samples)
        for _ in range(remaining):
            samples += next_batch_size(samples)
        return samples


def next_batch_size(samples: int) -> int:
    """Return the size of the batch that follows a number of samples.

    Args:
        samples: Number of sequences that the run has trained on.
    """
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
