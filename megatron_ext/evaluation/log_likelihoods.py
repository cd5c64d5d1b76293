"""Log-likelihoods of many token sequences under one model, whatever it runs on.

Sequences are batched by length, so that little of a batch is padding. Padding stands on the right,
where a causal model's logits cannot see it, and no router here looks beyond its own token. Batches
follow from the sequences and their budget alone, and copies of the model take whole batches in
turn, so that how many copies there are does not change what a batch holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.evaluation.text_losses import TextCodec

BATCH_TOKENS = 4096


class ScoringRequest(NamedTuple):
    """A sequence whose end is scored.

    Attributes:
        tokens: int `[length]`, at least two.
        start: the first token that is scored, at least 1; all later ones are too.
    """

    tokens: NDArray[np.int32]
    start: int


class LogLikelihood(NamedTuple):
    """What a model says of a request's end.

    Attributes:
        loss: sum over the scored tokens, nats.
        tokens: how many were scored.
        greedy: whether each of them is the likeliest after what precedes it.
    """

    loss: float
    tokens: int
    greedy: bool


class ScoringBatch(NamedTuple):
    """Requests as tensors.

    Attributes:
        tokens: int64 `[rows, length]`, padded on the right with zeros.
        padding: bool `[rows, length]`, True where padded.
        places: int64 `[n]`, of the tokens before the targets, in `tokens.flatten()`.
        targets: int64 `[n]`, the scored tokens of all rows, one row after the other.
    """

    tokens: Tensor
    padding: Tensor
    places: Tensor
    targets: Tensor


@dataclass(frozen=True)
class DataReplicas:
    """The copies of a model that share the work.

    Attributes:
        own: this rank's copy, counted from 0.
        number: how many there are.
        in_step: whether they need each other, so that each must run as often as the others.
    """

    own: int = 0
    number: int = 1
    in_step: bool = False


class LanguageModel(ABC):
    """A causal language model to evaluate.

    Attributes:
        codec: between text and its tokens.
        max_length: the longest sequence it takes, in tokens.
        replicas: how ranks share the work.
        description: what tells its results from those of another model.
    """

    codec: TextCodec
    max_length: int
    replicas: DataReplicas
    description: dict[str, Any]

    @abstractmethod
    def log_probs(self, batch: ScoringBatch) -> Tensor | None:
        """fp32 `[2, n]`: log-probabilities of the targets, and 1 where one is the likeliest.

        None on ranks that do not know.
        """

    def score(
        self,
        requests: Sequence[ScoringRequest],
        batch_tokens: int = BATCH_TOKENS,
        done: Callable[[int], None] = lambda number: None,
    ) -> list[LogLikelihood]:
        """Score every request; all ranks must call it with the same and get the same.

        Args:
            batch_tokens: of a batch, padding included; a longer sequence is one by itself.
            done: told how many more requests are scored.
        """
        batches = batches_by_length([len(r.tokens) - 1 for r in requests], batch_tokens)
        own: dict[int, LogLikelihood] = {}
        for first in range(0, len(batches), self.replicas.number):
            turn = batches[first : first + self.replicas.number]
            if self.replicas.own < len(turn):
                mine = turn[self.replicas.own]
                own.update(zip(mine, self._score_batch([requests[i] for i in mine])))
            elif self.replicas.in_step:
                self._score_batch([])
            done(sum(map(len, turn)))
        scores = merged(own)
        return [scores[i] for i in range(len(requests))]

    def _score_batch(self, requests: list[ScoringRequest]) -> list[LogLikelihood]:
        """Scores in order on the ranks that know them, nothing on the others."""
        log_probs = self.log_probs(batch_of(requests))
        if log_probs is None:
            return []
        sizes = [len(request.tokens) - request.start for request in requests]
        return [
            LogLikelihood(-float(part[0].double().sum()), size, bool(part[1].all()))
            for size, part in zip(sizes, log_probs.cpu().split(sizes, dim=1))
        ]


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences, the longest first, in batches that hold `budget` tokens when padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def batch_of(requests: Sequence[ScoringRequest]) -> ScoringBatch:
    """Requests as tensors; of none, one row of padding, for ranks that must run in step."""
    length = max((len(request.tokens) - 1 for request in requests), default=1)
    tokens = np.zeros((max(len(requests), 1), length), dtype=np.int64)
    padding = np.ones(tokens.shape, dtype=bool)
    places, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for row, (sequence, start) in enumerate(requests):
        inputs = len(sequence) - 1
        assert 1 <= start <= inputs
        tokens[row, :inputs] = sequence[:-1]
        padding[row, :inputs] = False
        places.append(row * length + np.arange(start - 1, inputs))
        targets.append(sequence[start:])
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    arrays = (tokens, padding, np.concatenate(places), np.concatenate(targets).astype(np.int64))
    return ScoringBatch(*(torch.from_numpy(array).to(device) for array in arrays))


def merged(own: dict[int, Any]) -> dict[int, Any]:
    """What all ranks know together; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {index: value for part in everyone for index, value in part.items()}


def from_first_rank[Made](make: Callable[[], Made]) -> Made:
    """What the first rank makes, on all ranks, so that they agree on what a file says."""
    made: list[Any] = [make() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]
