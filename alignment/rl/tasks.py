"""What reinforcement learning is given: prompts, who rewards answers to them, and settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from alignment.engines.batch import TokenBatch
from alignment.rl.algorithms import Algorithm
from alignment.rl.rollouts import RewardResult, Rollout
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class PromptTask:
    """A prompt to be answered.

    Attributes:
        prompt: token ids.
        about: what the reward needs to know.
    """

    id: str
    prompt: Sequence[int]
    about: Any


class RewardFunction(Protocol):
    """Rewards responses; a collective of all ranks, each with groups of its own."""

    def __call__(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> Sequence[Sequence[RewardResult]]:
        """The rewards of each group's responses.

        Args:
            check: to be called on all ranks now and then; may raise.
        """
        ...


@dataclass(frozen=True)
class RLSettings:
    """Of the learning.

    Attributes:
        algorithm: see `ALGORITHMS`.
        groups: prompts of a step, on all ranks.
        group_size: responses to each.
        mini_batches: optimizer steps of a step.
        length: of the rows that samples are packed into; a prompt with its response must fit.
        sampling: of the responses.
        rows: responses that are sampled at a time on a rank.
        overlong_margin: tokens before the limit in which a response is punished.
        max_unrewarded: share of a step's responses without a reward that ends the run.
        draws: with an algorithm that wants groups of unequal rewards: how often a step may draw.
    """

    algorithm: Algorithm
    groups: int
    group_size: int
    mini_batches: int
    length: int
    sampling: Sampling
    rows: int = 64
    overlong_margin: int = 1
    max_unrewarded: float = 0.2
    draws: int = 3

    def __post_init__(self) -> None:
        if self.group_size < 2 and self.algorithm.advantages is not None:
            raise UserError(f"--group-size {self.group_size} must be at least 2, to compare")
        if not 0 < self.mini_batches <= self.groups * self.group_size:
            raise UserError(
                f"--mini-batches {self.mini_batches} must be at least 1 and at most the "
                f"{self.groups * self.group_size} responses of a step"
            )


Group = tuple[PromptTask, list[Rollout], list[RewardResult]]
ReferenceLogProbs = Callable[[TokenBatch, float], torch.Tensor]
