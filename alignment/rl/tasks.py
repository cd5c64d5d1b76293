"""Inputs of reinforcement learning: prompts, their order, reward function and settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from alignment.engines.batch import TokenBatch
from alignment.rl.algorithms import Algorithm
from alignment.rl.rollouts import RewardResult, Rollout, RolloutGroup
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class PromptTask:
    """Prompt that the policy answers.

    Attributes:
        id: Name of the prompt, unique in a run.
        prompt: Token ids.
        metadata: Data about the prompt for the reward function.
    """

    id: str
    prompt: Sequence[int]
    metadata: Any


class RolloutRequest(NamedTuple):
    """Response that a step requires: its task, its number in the group, the prompt and the seed."""

    task: str
    sample: int
    prompt: Sequence[int]
    seed: int


class RewardFunction(Protocol):
    """Function that rewards responses; a collective of all ranks, each with its own groups."""

    def __call__(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> Sequence[Sequence[RewardResult]]:
        """Return the rewards of each group's responses.

        Args:
            groups: Tasks with their responses.
            check: Function to call on all ranks from time to time. It may raise on all of them.
        """
        ...


RolloutFilter = Callable[[RolloutGroup], Sequence[bool]]


@dataclass(frozen=True)
class RLSettings:
    """Settings of reinforcement learning.

    Attributes:
        algorithm: Advantages and loss; see `alignment.rl.algorithms`.
        groups: Prompts per step, on all ranks together.
        group_size: Responses to each prompt.
        mini_batches: Optimizer steps per step.
        seq_length: Length in tokens of the rows into which responses are packed. A prompt with its
            response must fit.
        sampling: Settings of sampling.
        generation_batch_size: Responses that a rank samples in one batch.
        overlong_margin: Tokens before the limit in which a response is penalized, for an algorithm
            with that penalty.
        max_unrewarded: Largest share of a step's responses that may lack a reward.
        rollout_filter: Function that selects the responses of a group, with their rewards, on which
            to train. The others are excluded from the statistics of the group and from the loss.
            Default: all are selected.
        draws: Largest number of draws of prompts per step, for an algorithm with dynamic sampling.
    """

    algorithm: Algorithm
    groups: int
    group_size: int
    mini_batches: int
    seq_length: int
    sampling: Sampling
    generation_batch_size: int = 64
    overlong_margin: int = 1
    max_unrewarded: float = 0.2
    draws: int = 3
    rollout_filter: RolloutFilter | None = None

    def __post_init__(self) -> None:
        """Check the numbers, and let samplers report log-probabilities at their temperature.

        Raises:
            UserError: A number does not fit the others.
        """
        if self.group_size < 2 and self.algorithm.advantages is not None:
            raise UserError(
                f"--group-size {self.group_size} leaves no other response to compare with. "
                "Choose at least 2."
            )
        if not 0 < self.mini_batches <= self.groups * self.group_size:
            raise UserError(
                f"--mini-batches {self.mini_batches} must be at least 1 and at most the "
                f"{self.groups * self.group_size} responses of a step."
            )
        sampling = replace(self.sampling, score_temperature=self.sampling.temperature)
        object.__setattr__(self, "sampling", sampling)


class PromptOrder:
    """Prompts of every step, in an order that depends on the seed alone.

    Attributes:
        tasks: Tasks whose prompts leave room for a response.
        too_long: Number of the other tasks.
    """

    def __init__(self, tasks: Sequence[PromptTask], settings: RLSettings, seed: int) -> None:
        """Leave out the prompts that are too long.

        Raises:
            UserError: No prompt leaves room for a response, or there are too few for a step.
        """
        length, new_tokens = settings.seq_length, settings.sampling.max_new_tokens
        self.tasks = [task for task in tasks if len(task.prompt) <= length - new_tokens]
        self.too_long = len(tasks) - len(self.tasks)
        self._groups, self._seed = settings.groups, seed
        self._orders: dict[int, np.ndarray] = {}
        if not self.tasks:
            raise UserError(
                f"No prompt leaves room for --max-new-tokens {new_tokens} in --seq-length "
                f"{length}. Raise --seq-length, or lower --max-new-tokens."
            )
        if (count := len({task.id for task in self.tasks})) < settings.groups:
            raise UserError(
                f"A step requires {settings.groups} different prompts, and {count} fit. Add "
                "prompts, or lower --batch-size."
            )

    def draw(self, step: int, draw: int = 0) -> list[PromptTask]:
        """Return the prompts of a step, all of them different.

        Args:
            step: Number of the step, from 0.
            draw: 0 for the step's own prompts. Further draws are random prompts that the earlier
                draws of the step lack.
        """
        count, size = len(self.tasks), self._groups
        if draw:
            earlier_ids = {task.id for earlier in range(draw) for task in self.draw(step, earlier)}
            undrawn = [task for task in self.tasks if task.id not in earlier_ids]
            chosen = np.random.default_rng((self._seed, step, draw)).choice(
                len(undrawn), min(size, len(undrawn)), replace=False
            )
            return [undrawn[i] for i in chosen]
        # A step lies within one epoch, so that its prompts differ. The rest of the epoch's order,
        # which is too short for a step, is not used.
        epoch, part = divmod(step, count // size)
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(count)
        return [self.tasks[i] for i in self._orders[epoch][part * size : (part + 1) * size]]


ReferenceLogProbs = Callable[[TokenBatch, float], torch.Tensor]
"""Function that returns the log-probabilities of a batch's tokens at a temperature."""
