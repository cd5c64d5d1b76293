"""Log-likelihoods of many token sequences under one model.

Sequences are batched by length, so that batches contain little padding. Padding is on the right,
where it does not affect the logits of a causal model, and routing by thresholds depends on each
token alone. Batches depend only on the sequences and the batch size, and replicas of the model
process whole batches in turn, so that the number of replicas does not change the batches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.evaluation.text_codec import TextCodec

BATCH_TOKENS = 4096


class ScoringRequest(NamedTuple):
    """Sequence whose end is scored.

    Attributes:
        tokens: Token ids, int `[length]`, at least two.
        start: Index of the first token that is scored, at least 1. All later ones are scored, too.
    """

    tokens: NDArray[np.int32]
    start: int


class LogLikelihood(NamedTuple):
    """Loss of the scored tokens of a request.

    Attributes:
        loss: Sum over the scored tokens, in nats.
        tokens: Number of scored tokens.
        greedy: Whether each of them is the most likely token in its context.
    """

    loss: float
    tokens: int
    greedy: bool


class ScoringBatch(NamedTuple):
    """Requests as tensors.

    Attributes:
        tokens: Token ids, int64 `[rows, length]`, padded on the right with zeros.
        padding: Mask of the padding, bool `[rows, length]`.
        places: Positions of the tokens before the targets in `tokens.flatten()`, int64 `[n]`.
        targets: Scored tokens of all rows, row by row, int64 `[n]`.
    """

    tokens: Tensor
    padding: Tensor
    places: Tensor
    targets: Tensor


@dataclass(frozen=True)
class DataReplicas:
    """Replicas of a model that share the batches.

    Attributes:
        index: Index of this rank's replica.
        number: Number of replicas.
        in_step: Whether the replicas share experts, so that all must run the same number of passes.
    """

    index: int = 0
    number: int = 1
    in_step: bool = False


class LanguageModel(ABC):
    """Causal language model to evaluate.

    Attributes:
        codec: Encoder and decoder of text.
        max_length: Context length, in tokens.
        replicas: Replicas that share the batches.
        description: Properties that identify the model in results.
    """

    codec: TextCodec
    max_length: int
    replicas: DataReplicas
    description: dict[str, Any]

    @abstractmethod
    def log_probs(self, batch: ScoringBatch) -> Tensor | None:
        """Compute the log-probabilities of the targets of a batch.

        Returns:
            fp32 `[2, n]`: log-probabilities in nats, and 1 where the target is the most likely
            token. None on ranks that do not have the result.
        """

    def score(
        self,
        requests: Sequence[ScoringRequest],
        batch_tokens: int = BATCH_TOKENS,
        done: Callable[[int], None] = lambda number: None,
    ) -> list[LogLikelihood]:
        """Score every request. All ranks must pass the same requests and get the same results.

        Args:
            requests: The requests.
            batch_tokens: Tokens per batch, padding included. A longer sequence forms a batch alone.
            done: Callback that receives the number of requests scored since its last call.

        Raises:
            UserError: A log-likelihood is not a number.
        """
        batches = batches_by_length([len(r.tokens) - 1 for r in requests], batch_tokens)
        local_scores: dict[int, LogLikelihood] = {}
        for first in range(0, len(batches), self.replicas.number):
            turn = batches[first : first + self.replicas.number]
            if self.replicas.index < len(turn):
                indices = turn[self.replicas.index]
                local_scores.update(zip(indices, self._score_batch([requests[i] for i in indices])))
            elif self.replicas.in_step:
                self._score_batch([])
            done(sum(map(len, turn)))
        scores = merged(local_scores)
        if any(math.isnan(score.loss) for score in scores.values()):
            raise UserError(
                "The logits of the model are not finite, so no text can be scored. Its weights "
                "have diverged or are damaged. Use an earlier checkpoint."
            )
        return [scores[i] for i in range(len(requests))]

    def _score_batch(self, requests: list[ScoringRequest]) -> list[LogLikelihood]:
        """Return the scores in order, or an empty list on ranks that do not have them."""
        log_probs = self.log_probs(batch_of(requests))
        if log_probs is None:
            return []
        sizes = [len(request.tokens) - request.start for request in requests]
        return [
            LogLikelihood(-float(part[0].double().sum()), size, bool(part[1].all()))
            for size, part in zip(sizes, log_probs.cpu().split(sizes, dim=1))
        ]


def batches_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide sequences into batches, the longest sequences first.

    Args:
        lengths: Length of each sequence.
        budget: Maximum number of tokens in a batch, padding included.

    Returns:
        Indices of the sequences of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def batch_of(requests: Sequence[ScoringRequest]) -> ScoringBatch:
    """Convert requests to tensors; no requests give one row of padding, for a pass in step."""
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


def merged(local: dict[int, Any]) -> dict[int, Any]:
    """Return the union of the ranks' dictionaries. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return {index: value for part in gathered for index, value in part.items()}


def from_first_rank[Made](make: Callable[[], Made]) -> Made:
    """Call a function on the first rank and return its result on all ranks."""
    result: list[Any] = [make() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]
