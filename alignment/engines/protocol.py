"""Protocol of an engine, and of a loss.

A loss is a plain function of the scores of a batch and of the batch. It returns a sum and the
weight to divide it by, a number of tokens or of samples. The engine adds both over all
micro-batches and data-parallel ranks and divides once, so that a step does not depend on how its
samples are divided among ranks and micro-batches.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alignment.engines.batch import TokenBatch, TokenSample
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of a batch under a model.

    Attributes:
        log_probs: fp32 `[rows, length]`, nats: log-probability of each token after the tokens of
            its sample before it. 0 for a sample's first token and for padding.
        entropy: fp32 `[rows, length]`, nats, if it was computed: entropy of the distribution that
            the token belongs to. 0 at the same positions.
        values: fp32 `[rows, length]`, if values were computed: value of the state before each
            token. 0 at the same positions. Log-probabilities are then 0 and were not computed.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


def align_scores(scores: Tensor, scored: Tensor, values: bool = False) -> TokenScores:
    """Move scores from the tokens after which they were computed to the scored tokens.

    Args:
        scores: fp32 `[1 or 2, rows, length]`, each at the token before the scored one.
        scored: bool `[rows, length]`, tokens that have a score. The others get 0.
        values: Whether the scores are a critic's values.
    """
    moved = F.pad(scores, (1, 0))[..., :-1]
    moved = torch.where(scored, moved, 0.0)
    if values:
        return TokenScores(torch.zeros_like(moved[0]), values=moved[0])
    return TokenScores(moved[0], moved[1] if len(moved) > 1 else None)


@dataclass(frozen=True)
class LossSums:
    """Sums that a loss returns for some rows.

    Attributes:
        total: Scalar with a gradient.
        weight: int64 scalar that depends on the batch alone.
        metrics: Totals and the weights to divide them by, by name, without a gradient. The names
            are the same for every batch.
        maxima: Scalars without a gradient that are at least 0, by name. The largest value of all
            micro-batches and ranks is a metric. The names are the same for every batch.
    """

    total: Tensor
    weight: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[TokenScores, TokenBatch], LossSums]


def negative_log_likelihood(scores: TokenScores, batch: TokenBatch) -> LossSums:
    """Return the loss of supervised fine-tuning, a mean over trained tokens."""
    return LossSums(-(scores.log_probs * batch.loss_mask).sum(), batch.loss_mask.sum())


def reduce_sums(parts: Sequence[LossSums], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Return loss and metrics of all micro-batches and all ranks of a group, each divided once."""
    pairs_by_name = [{"loss": (sums.total, sums.weight), **sums.metrics} for sums in parts]
    flat = [[part.detach().double() for pair in e.values() for part in pair] for e in pairs_by_name]
    total = torch.stack([torch.stack(values) for values in flat]).sum(dim=0)
    dist.all_reduce(total, group=group)
    sums, weights = total.view(-1, 2).unbind(dim=1)
    metrics = dict(zip(pairs_by_name[0], (sums / weights.clamp(min=1)).tolist()))
    if names := list(parts[0].maxima):
        largest = torch.stack([torch.stack([p.maxima[name] for name in names]) for p in parts])
        largest = largest.detach().float().amax(dim=0)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        metrics |= dict(zip(names, largest.tolist()))
    return metrics


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW with a linear schedule. Biases and scales of norms have no weight decay.

    Attributes:
        lr: Highest learning rate.
        steps: Optimizer steps in which the learning rate falls to 0.
        warmup: Optimizer steps, out of `steps`, in which it rises from 0.
        betas: Decay rates of the moments.
        eps: Constant in the denominator of the update.
        weight_decay: Decoupled weight decay.
        clip: Largest norm of all gradients together. 0 for no bound.
        schedule: Function that returns the learning rate of an optimizer step, counted from 0, of
            these settings. Default: linear warm-up and linear decay to 0.
    """

    lr: float = 1e-6
    steps: int = 1000
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: "Callable[[int, Optimization], float] | None" = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: A setting is out of its range.
        """
        if not 0 <= self.warmup < self.steps:
            raise UserError(
                f"The warm-up of {self.warmup} steps must be at least 0 and below the {self.steps} "
                "steps of the training."
            )
        if self.lr <= 0 or self.clip < 0 or self.weight_decay < 0:
            raise UserError(
                f"The learning rate {self.lr} must be above 0, and the gradient clip {self.clip} "
                f"and the weight decay {self.weight_decay} must not be negative."
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0."""
        if self.schedule is not None:
            return self.schedule(step, self)
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.lr * max(0.0, (self.steps - step) / (self.steps - self.warmup))


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, the same on every rank.

    Attributes:
        loss: Mean loss before the step.
        grad_norm: Norm of all gradients before they were clipped. None if gradients overflowed in
            fp16: the optimizer then skipped the step, which was not counted, and lowered the scale.
        lr: Learning rate of the step.
        metrics: Means and maxima of the loss's metrics, by name.
    """

    loss: float
    grad_norm: float | None
    lr: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class GeneratedResponse:
    """Response that an engine generated.

    Attributes:
        tokens: Token ids, with the one that ended the response.
        log_probs: Log-probability of each token under the model, in nats, at
            `Sampling.score_temperature`.
        ended: Whether the model ended the response, and not the limit of its length.
    """

    tokens: list[int]
    log_probs: list[float]
    ended: bool


class AlignmentEngine(Protocol):
    """Model on all ranks, with its optimizer. Every method is a collective of all ranks.

    Ranks with the same `data_rank` have parts of one copy of the model and must pass the same
    batches and prompts. Other ranks pass their own, with any number of rows, even none.

    Attributes:
        data_rank: Number of this rank's share of the data.
        data_size: Number of shares of the data.
        step: Number of finished optimizer steps.
    """

    data_rank: int
    data_size: int
    step: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the model computes."""
        ...

    def log_probs(
        self,
        batch: TokenBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        trained_only: bool = False,
    ) -> TokenScores:
        """Return scores without gradients.

        Args:
            batch: Samples of this rank.
            temperature: Divisor of the logits.
            entropy: Whether to compute entropies.
            trained_only: Compute only the scores of trained tokens, those of `loss_mask`. The
                others are 0, and the output layer is not computed for prompts.
        """

    def next_log_probs(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some tokens after each sample, for labels of a judge.

        Args:
            batch: Samples of this rank.
            tokens: Token ids.

        Returns:
            fp32 `[rows, length, tokens]`, nats, at temperature 1, without gradients: the
            log-probability of each of `tokens` after the last token of each sample, at the position
            of that token; 0 at all other positions.
        """

    def values(self, batch: TokenBatch, token: int, *, trained_only: bool = False) -> Tensor:
        """Return a critic's values of the states before the batch's tokens, without gradients.

        A value is the product of the last hidden state and one row of the output layer, the row of
        a token that no prompt contains.

        Args:
            batch: Samples of this rank.
            token: Token whose row computes the values.
            trained_only: Compute only the values of trained tokens, those of `loss_mask`. The
                others are 0.

        Returns:
            fp32 `[rows, length]`; 0 for a sample's first token and for padding.
        """

    def train_step(
        self,
        batch: TokenBatch,
        loss: Loss,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        values: int | None = None,
    ) -> StepResult:
        """Make one optimizer step on the batches of all ranks together.

        The loss gets the scores of trained tokens, those of `loss_mask`. The scores of the other
        tokens are not computed and are 0.

        Args:
            batch: Samples of this rank.
            loss: Loss of the batch.
            temperature: Divisor of the logits.
            entropy: Whether to compute entropies, with gradients.
            values: Token whose row of the output layer computes values, which the loss receives
                instead of log-probabilities.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[GeneratedResponse]:
        """Continue prompts with the current weights.

        Args:
            prompts: Token ids of this rank's prompts.
            sampling: Settings of sampling.
            seeds: One seed per prompt. Default: 0, 1, ...
        """

    def routing_gap(
        self, samples: Sequence[TokenSample], length: int, temperature: float = 1.0
    ) -> Mapping[str, float]:
        """Compare the routing of the same responses in generation and in training.

        Generation runs a prompt and then one token at a time; training runs rows of packed samples.
        Both use the current weights.

        Args:
            samples: Samples of this rank, each with a response.
            length: Length of the rows, in tokens.
            temperature: Divisor of the logits.

        Returns:
            Metrics named `routing/...`, the same on all ranks, which
            docs/reference/policy-training.md lists. Empty for a model without experts, and for an
            engine that does not know their routing.
        """

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of all parameters, and of those that a token uses on average."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's whole tensors under their Hugging Face names, on every rank."""

    def load_parameters(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole tensors, passed on every rank, into the model, but not into the optimizer.

        Raises:
            UserError: A tensor is missing or has another shape.
        """

    def export(self, folder: str | os.PathLike[str], *, untie_head: bool = False) -> None:
        """Write the model as a Hugging Face folder, and replace a folder of that name.

        The folder is replaced only when the new one is complete. All ranks write parts of it.

        Args:
            folder: Folder to write.
            untie_head: Write an output layer that is tied to the embeddings as a separate tensor.

        Raises:
            UserError: The folder cannot be written, on all ranks.
        """

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint from which training can resume."""

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Resume exactly from the checkpoint that `save` wrote.

        Raises:
            UserError: There is no checkpoint, or it is incomplete or damaged.
        """
