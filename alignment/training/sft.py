"""Supervised fine-tuning on completions, in packed rows."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from alignment.engines.balancing import pack
from alignment.engines.batch import TokenSample
from alignment.engines.protocol import AlignmentEngine, negative_log_likelihood
from alignment.training.loop import Metrics


def steps_of(samples: int, batch_size: int, epochs: float) -> int:
    """Return the optimizer steps of a number of epochs."""
    return max(1, ceil(samples * epochs / batch_size))


class SupervisedStep:
    """Step of supervised training on the next samples in the order of their epoch.

    The order depends on the seed and the epoch alone, and the loss is the mean over all trained
    tokens of the step, so that a step is the same on any number of ranks.
    """

    def __init__(
        self,
        engine: AlignmentEngine,
        samples: Sequence[TokenSample],
        batch_size: int,
        length: int,
        seed: int,
    ) -> None:
        """Create the step.

        Args:
            engine: Engine that is trained.
            samples: All samples, the same on every rank.
            batch_size: Samples per step, on all ranks together.
            length: Length in tokens of the rows into which samples are packed.
            seed: Seed of the order of the samples.
        """
        self.engine, self.samples, self.length = engine, samples, length
        self.batch_size, self.seed = batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Metrics:
        """Train on the samples of a step, counted from 0, and return its metrics."""
        first = step * self.batch_size
        chosen = [self._at(place) for place in range(first, first + self.batch_size)]
        share = chosen[self.engine.data_rank :: self.engine.data_size]
        batch = pack(self.engine, share, self.length)
        result = self.engine.train_step(batch, negative_log_likelihood)
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": sum(len(sample.tokens) for sample in chosen),
            "trained_tokens": sum(len(s.tokens) - s.prompt for s in chosen),
            **result.metrics,
            "epoch": (first + self.batch_size) / len(self.samples),
        }

    def _at(self, place: int) -> TokenSample:
        epoch, index = divmod(place, len(self.samples))
        if epoch not in self._orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
            self._orders[epoch] = order
        return self.samples[self._orders[epoch][index]]
