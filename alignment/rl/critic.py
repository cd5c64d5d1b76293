"""Critic of PPO, which predicts the reward of a response before each of its tokens.

The critic is a second trained model on the ranks of the policy. It has no separate head, but uses
the row of the output layer for a token that no prompt contains. Every layout therefore divides,
saves and loads a critic like any other model. The row starts at 0, and so do all values.
"""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine, LossSums, StepResult, TokenScores
from alignment.ranks import all_gather_by_data_rank
from alignment.rl.advantages import generalized_advantages
from alignment.rounding import Floats, model_error, tolerance
from megatron_ext.errors import UserError

# A tied output layer has the name of the embedding only.
_HEADS = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class CriticSettings:
    """Settings of advantages and of the critic's training.

    Attributes:
        discount: Discount of later rewards, gamma.
        gae_lambda: Decay of the generalized advantage estimator, lambda.
        whiten: Whether to standardize advantages over all trained tokens of a step.
        clip: Change of a value in a step beyond which its token has no gradient. None for no bound.
        warmup: Number of first steps in which only the critic is trained.
    """

    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True
    clip: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: A setting is out of its range.
        """
        for flag, value in (("--gae-discount", self.discount), ("--gae-lambda", self.gae_lambda)):
            if not 0 <= value <= 1:
                raise UserError(f"{flag} {value} must be from 0 to 1.")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"--value-clip {self.clip} must be above 0.")


@dataclass(frozen=True)
class ValueLoss:
    """Loss of the critic: half the mean squared error of the values, over trained tokens.

    Attributes:
        clip: Bound of the change from `old_values`; see `CriticSettings`.
    """

    clip: float | None = None

    def __call__(self, scores: TokenScores, batch: TokenBatch) -> LossSums:
        """Return the sum of the loss over trained tokens, its weight, and metrics."""
        assert scores.values is not None
        mask, old = batch.loss_mask, batch.extras["old_values"]
        loss = (scores.values - batch.extras["returns"]).square() / 2
        metrics = {}
        if self.clip is not None:
            near = old + (scores.values - old).clamp(-self.clip, self.clip)
            bounded = (near - batch.extras["returns"]).square() / 2
            metrics["value_clipped"] = (((bounded > loss) & mask).sum(), mask.sum())
            loss = torch.maximum(loss, bounded)
        return LossSums(torch.where(mask, loss, 0).sum(), mask.sum(), metrics)


class Critic:
    """Critic that computes the advantages of a step and is trained on its rewards."""

    def __init__(
        self,
        engine: AlignmentEngine,
        used_tokens: AbstractSet[int],
        settings: CriticSettings | None = None,
        name: str = "the critic",
    ) -> None:
        """Choose the row that computes the values, and set it to 0.

        Args:
            engine: Engine of the critic, with an optimization.
            used_tokens: Tokens whose rows are in use: those of all prompts, and the end tokens.
            settings: Settings of advantages and training.
            name: Name of the model, for error messages.

        Raises:
            UserError: The model has no known output layer, or one with too few rows.
        """
        self.engine, self.settings = engine, settings or CriticSettings()
        sizes = {name: len(tensor) for name, tensor in engine.parameters()}
        heads = [full for head in _HEADS for full in sizes if full.endswith(head)]
        if not heads:
            raise UserError(
                f"{name} has no {' nor '.join(_HEADS)}. Choose another model for --critic."
            )
        rows = sizes[heads[0]]
        if max(used_tokens, default=0) >= rows:
            raise UserError(
                f"{name} has {rows:,} tokens, but the prompts use token {max(used_tokens)}. Choose "
                "a model with the policy's tokenizer for --critic."
            )
        self.token = max(set(range(rows)) - used_tokens)
        engine.load_parameters(self._with_empty_row(engine.parameters(), heads[0]))

    def _with_empty_row(
        self, tensors: Iterable[tuple[str, Tensor]], head: str
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name == head:
                tensor = tensor.clone()
                tensor[self.token] = 0
            yield name, tensor

    def compute_advantages(
        self, batches: Sequence[TokenBatch]
    ) -> tuple[list[TokenBatch], dict[str, float]]:
        """Return the batches of a step with advantages by GAE; a collective of all ranks.

        Args:
            batches: Batches with the extra `reward` of each response.

        Returns:
            The same batches with the extras `advantage`, `returns` and `old_values`, and
            metrics of all ranks.
        """
        valued = [self._with_values(batch) for batch in batches]
        advantages = self._trained_tokens(valued, "advantage")
        values, returns = (
            self._trained_tokens(valued, "old_values"),
            self._trained_tokens(valued, "returns"),
        )
        mean, spread = self._moments(advantages)
        rounding = self._rounding(values, returns)
        if self.settings.whiten:
            valued = [_whitened(batch, mean, spread, rounding) for batch in valued]
        _, error = self._moments(returns - values)
        _, spread_of_returns = self._moments(returns)
        return valued, {
            "value": self._moments(values)[0],
            # Equal returns have no variance to explain.
            "explained_variance": 1 - (error / spread_of_returns) ** 2
            if spread_of_returns > rounding
            else 0.0,
            "advantage_mean": mean,
            "advantage_std": spread,
        }

    def train_step(self, batch: TokenBatch) -> StepResult:
        """Make an optimizer step of the critic on a batch with advantages."""
        return self.engine.train_step(batch, ValueLoss(self.settings.clip), values=self.token)

    def _with_values(self, batch: TokenBatch) -> TokenBatch:
        values = self.engine.values(batch, self.token, trained_only=True).cpu()
        if not batch.rows:
            return batch
        extras = {**batch.extras, "old_values": values}
        extras["advantage"] = torch.zeros_like(values)
        extras["returns"] = torch.zeros_like(values)
        for row, places in _responses(batch):
            rewards = np.zeros(len(places))
            # The reward belongs to the last token.
            rewards[-1] = batch.extras["reward"][row, places[-1]]
            advantages, returns = generalized_advantages(
                rewards,
                values[row, places].double().numpy(),
                self.settings.discount,
                self.settings.gae_lambda,
            )
            extras["advantage"][row, places] = torch.from_numpy(advantages).float()
            extras["returns"][row, places] = torch.from_numpy(returns).float()
        return replace(batch, extras=extras)

    def _trained_tokens(self, batches: Sequence[TokenBatch], name: str) -> Floats:
        """Return an extra of this rank's trained tokens."""
        parts = [b.extras[name][b.loss_mask].double().numpy() for b in batches if b.rows]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _rounding(self, *values: Floats) -> float:
        """Return the largest difference of values that rounding can explain; a collective."""
        error = model_error(self.engine.dtype)
        return max(
            all_gather_by_data_rank(
                self.engine, max(tolerance(sample_values, error) for sample_values in values)
            )
        )

    def _moments(self, values: Floats) -> tuple[float, float]:
        """Return mean and standard deviation (n - 1) over all ranks; a collective."""
        counts, sums = zip(
            *all_gather_by_data_rank(self.engine, (len(values), float(values.sum())))
        )
        mean = sum(sums) / max(sum(counts), 1)
        squares = all_gather_by_data_rank(self.engine, float(((values - mean) ** 2).sum()))
        return mean, float(np.sqrt(sum(squares) / max(sum(counts) - 1, 1)))


def _responses(batch: TokenBatch) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the rows and the positions of the trained tokens of all samples."""
    for row in range(batch.rows):
        for number in range(int(batch.samples[row].max()) + 1):
            trained = (batch.samples[row] == number) & batch.loss_mask[row]
            if trained.any():
                yield row, trained.nonzero().flatten()


def _whitened(batch: TokenBatch, mean: float, spread: float, rounding: float) -> TokenBatch:
    """Standardize the advantages, or set them to 0 if they differ only by rounding."""
    if not batch.rows:
        return batch
    scale = 1 / spread if spread > rounding else 0.0
    advantage = (batch.extras["advantage"].double() - mean) * scale
    return replace(batch, extras={**batch.extras, "advantage": advantage.float()})
