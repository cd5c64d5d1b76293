"""A critic: what a response is expected to be worth, before each of its tokens (PPO).

It is a second trained model on the ranks of the policy. It has no head of its own: the row of the
output layer that belongs to a token which no prompt has is given away for one. So every layout
spreads, saves and loads a critic as it does any model. The row starts at 0, hence so do all values.
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

# An output layer that is the embedding's transpose is only known by that name.
_HEADS = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class CriticSettings:
    """How values become advantages, and are learnt.

    Attributes:
        discount: gamma.
        gae_lambda: lambda of GAE.
        whiten: advantages from the mean over all trained tokens of a step, in standard deviations.
        clip: how far a value may move in a step before its token stops to pull; none for no bound.
        warmup: first steps in which the critic alone is trained.
    """

    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True
    clip: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--gae-discount", self.discount), ("--gae-lambda", self.gae_lambda)):
            if not 0 <= value <= 1:
                raise UserError(f"{flag} {value} must be from 0 to 1")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"--value-clip {self.clip} must be above 0")


@dataclass(frozen=True)
class ValueLoss:
    """Half the mean squared distance of values from `returns`, over all trained tokens.

    Attributes:
        clip: see `CriticSettings`; bounds the distance from `old_values`.
    """

    clip: float | None = None

    def __call__(self, scores: TokenScores, batch: TokenBatch) -> LossSums:
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
    """Values the responses of a step, and learns from what they were worth."""

    def __init__(
        self,
        engine: AlignmentEngine,
        seen: AbstractSet[int],
        settings: CriticSettings | None = None,
        name: str = "the critic",
    ) -> None:
        """Give a token's row away, and set it to 0.

        Args:
            engine: the model, with an optimization.
            seen: tokens that are not to be given away: those of all prompts, and the end.
            name: of the model, for errors.

        Raises:
            UserError: its output layer is not found, or has fewer rows than there are tokens.
        """
        self.engine, self.settings = engine, settings or CriticSettings()
        sizes = {name: len(tensor) for name, tensor in engine.parameters()}
        heads = [full for head in _HEADS for full in sizes if full.endswith(head)]
        if not heads:
            raise UserError(f"{name} has no {' nor '.join(_HEADS)}: give --critic another model")
        rows = sizes[heads[0]]
        if max(seen, default=0) >= rows:
            raise UserError(
                f"{name} knows {rows:,} tokens, and there is a token {max(seen)}: give --critic a "
                "model with the policy's tokenizer"
            )
        self.token = max(set(range(rows)) - seen)
        engine.load_parameters(self._emptied(engine.parameters(), heads[0]))

    def _emptied(
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
        """Advantages by GAE of all batches of a step; a collective of all ranks.

        Args:
            batches: Batches with the extra `reward` of each response.

        Returns:
            The same batches with the extras `advantage`, `returns` and `old_values`, and
            metrics of all ranks.
        """
        judged = [self._with_values(batch) for batch in batches]
        advantages = self._trained(judged, "advantage")
        values, returns = self._trained(judged, "old_values"), self._trained(judged, "returns")
        mean, spread = self._moments(advantages)
        rounding = self._rounding(values, returns)
        if self.settings.whiten:
            judged = [_shifted(batch, mean, spread, rounding) for batch in judged]
        _, error = self._moments(returns - values)
        _, whole = self._moments(returns)
        return judged, {
            "value": self._moments(values)[0],
            # Of returns that are all the same there is no variance to explain.
            "explained_variance": 1 - (error / whole) ** 2 if whole > rounding else 0.0,
            "advantage_mean": mean,
            "advantage_std": spread,
        }

    def train_step(self, batch: TokenBatch) -> StepResult:
        """An optimizer step on a judged batch."""
        return self.engine.train_step(batch, ValueLoss(self.settings.clip), values=self.token)

    def _with_values(self, batch: TokenBatch) -> TokenBatch:
        values = self.engine.values(batch, self.token).cpu()
        if not batch.rows:
            return batch
        extras = {**batch.extras, "old_values": values}
        extras["advantage"] = torch.zeros_like(values)
        extras["returns"] = torch.zeros_like(values)
        for row, places in _responses(batch):
            rewards = np.zeros(len(places))
            rewards[-1] = batch.extras["reward"][row, places[-1]]  # a reward is that of the end
            advantages, returns = generalized_advantages(
                rewards,
                values[row, places].double().numpy(),
                self.settings.discount,
                self.settings.gae_lambda,
            )
            extras["advantage"][row, places] = torch.from_numpy(advantages).float()
            extras["returns"][row, places] = torch.from_numpy(returns).float()
        return replace(batch, extras=extras)

    def _trained(self, batches: Sequence[TokenBatch], name: str) -> Floats:
        """Of this rank's trained tokens."""
        parts = [b.extras[name][b.loss_mask].double().numpy() for b in batches if b.rows]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _rounding(self, *values: Floats) -> float:
        """The largest difference of values that rounding of the model explains, on all ranks."""
        error = model_error(self.engine.dtype)
        return max(
            all_gather_by_data_rank(self.engine, max(tolerance(each, error) for each in values))
        )

    def _moments(self, values: Floats) -> tuple[float, float]:
        """Mean and standard deviation (of a sample) over all ranks."""
        counts, sums = zip(
            *all_gather_by_data_rank(self.engine, (len(values), float(values.sum())))
        )
        mean = sum(sums) / max(sum(counts), 1)
        squares = all_gather_by_data_rank(self.engine, float(((values - mean) ** 2).sum()))
        return mean, float(np.sqrt(sum(squares) / max(sum(counts) - 1, 1)))


def _responses(batch: TokenBatch) -> Iterator[tuple[int, Tensor]]:
    """Row and places of the trained tokens of every sample."""
    for row in range(batch.rows):
        for number in range(int(batch.samples[row].max()) + 1):
            mine = (batch.samples[row] == number) & batch.loss_mask[row]
            if mine.any():
                yield row, mine.nonzero().flatten()


def _shifted(batch: TokenBatch, mean: float, spread: float, rounding: float) -> TokenBatch:
    """Advantages from their mean, in standard deviations; all 0 where their spread is rounding."""
    if not batch.rows:
        return batch
    scale = 1 / spread if spread > rounding else 0.0
    advantage = (batch.extras["advantage"].double() - mean) * scale
    return replace(batch, extras={**batch.extras, "advantage": advantage.float()})
