"""Log-probabilities, entropies and values of tokens whose vocabulary ranks share; their places."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import TokenScores, align_scores
from megatron_ext.sequence import sequence_positions


class TokenScorer:
    """Takes the place of the model's loss: from its last hidden states to scores of a batch."""

    def __init__(
        self,
        batch: TokenBatch,
        groups: ProcessGroupCollection,
        temperature: float = 1.0,
        entropy: bool = False,
        choices: Sequence[int] = (),
        values: int | None = None,
    ) -> None:
        """See the class.

        Args:
            batch: whole rows, on the model's device.
            groups: whose ranks share a vocabulary (tp) and a row (cp).
            temperature: divides the logits.
            entropy: whether it is asked for.
            choices: score these tokens after each token, and not the batch's own.
            values: give values instead, by the output layer's row of this token.
        """
        self.batch, self.groups = batch, groups
        self.temperature, self.entropy, self.choices = temperature, entropy, choices
        self.values = values
        ranks, length = groups.cp.size(), batch.length // groups.cp.size()
        device = batch.tokens.device
        places = [sequence_positions(length, rank, ranks, device) for rank in range(ranks)]
        self.places = places[groups.cp.rank()]  # of this rank's tokens in their rows
        self._order = torch.cat(places).argsort()

    def __call__(
        self,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Any,
        scale_logits: Any,
        **_: Any,
    ) -> Tensor:
        """Score the token after each of this rank's.

        Returns:
            fp32 `[length of this rank, rows, 1 or 2]`: log-probabilities, and entropies if asked;
            or `[length of this rank, rows, choices]`; or values, `[length of this rank, rows, 1]`.
        """
        if self.values is not None:
            weight = output_layer.weight if output_weight is None else output_weight
            spread = output_layer.sequence_parallel
            return row_values(hidden_states, weight, self.values, self.groups.tp, spread)
        logits, _ = output_layer(hidden_states, weight=output_weight)
        logits = scale_logits(logits).float() / self.temperature  # [length, rows, vocabulary part]
        if self.choices:
            return vocab_parallel_log_probs(logits, self.choices, self.groups.tp)
        targets = F.pad(self.batch.tokens, (0, 1))[:, 1:][:, self.places]
        found = [] if not self.entropy else [vocab_parallel_entropy(logits.clone(), self.groups.tp)]
        # In place of the logits it writes what its backward pass needs.
        found.insert(0, -vocab_parallel_cross_entropy(logits, targets.T.contiguous()))
        return torch.stack(found, dim=-1)

    def scores(self, found: Tensor) -> TokenScores:
        """Scores of the whole rows, on every rank that shares them, each score at its own token.

        A gradient goes back to the rank whose score it is.
        """
        return align_scores(self.whole(found), self.batch, self.values is not None)

    def whole(self, found: Tensor) -> Tensor:
        """What was found for the rows' parts, on every rank that shares them: `[kinds, rows,
        length]`, each at the token that it comes after."""
        if self.groups.cp.size() > 1:
            found = gather_from_sequence_parallel_region(
                found, tensor_parallel_output_grad=False, group=self.groups.cp
            )[self._order]
        return found.permute(2, 1, 0)


def row_values(
    hidden_states: Tensor, weight: Tensor, token: int, group: dist.ProcessGroup, spread: bool
) -> Tensor:
    """Products of hidden states with one row of an output layer that ranks hold parts of, in fp32.

    Neither the other rows' logits nor what is done to logits afterwards, a soft cap say, has a part
    in it.

    Args:
        hidden_states: `[length, rows, hidden]`.
        weight: `[vocabulary of this rank, hidden]`.
        token: whose row.
        group: the ranks.
        spread: the ranks hold parts of the length too.

    Returns:
        `[whole length, rows, 1]`.
    """
    if spread:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    place = token - group.rank() * len(weight)
    mine = 0 <= place < len(weight)
    # Others multiply by 0, and do not leave out what the backward pass does together.
    row = weight[place if mine else 0].float() * mine
    part = (hidden_states.float() @ row).unsqueeze(-1)
    return reduce_from_tensor_model_parallel_region(part, group=group)


@torch.no_grad()
def vocab_parallel_log_probs(
    logits: Tensor, tokens: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Log-probabilities of some tokens in distributions over a vocabulary that ranks hold parts of.

    Args:
        logits: fp32 `[..., vocabulary of this rank]`, -inf for what cannot be drawn.
        tokens: ids.
        group: the ranks.

    Returns:
        nats, `[..., tokens]`.
    """
    size = logits.shape[-1]
    first = group.rank() * size
    largest = logits.amax(dim=-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    parts = [(logits - largest).exp().sum(dim=-1)]
    for token in tokens:
        mine = first <= token < first + size
        parts.append(logits[..., token - first] if mine else torch.zeros_like(parts[0]))
    sums = torch.stack(parts, dim=-1)
    dist.all_reduce(sums, group=group)
    return sums[..., 1:] - sums[..., :1].log() - largest


def vocab_parallel_entropy(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entropy of distributions over a vocabulary that ranks hold parts of.

    Args:
        logits: fp32 `[..., vocabulary of this rank]`, -inf for what cannot be drawn.
        group: the ranks.

    Returns:
        nats, `[...]`.
    """
    with torch.no_grad():
        largest = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits = logits - largest
    weights = logits.exp()
    # 0 * -inf has no value; its limit is 0.
    products = weights * torch.where(logits.isneginf(), 0.0, logits)
    sums = torch.stack([weights.sum(dim=-1), products.sum(dim=-1)])
    total, product = reduce_from_tensor_model_parallel_region(sums, group=group)
    return total.log() - product / total
