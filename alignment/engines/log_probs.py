"""Log-probabilities, entropies and values of tokens, with the vocabulary divided among ranks."""

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
    """Output processor that computes the scores of a batch from the last hidden states."""

    def __init__(
        self,
        batch: TokenBatch,
        groups: ProcessGroupCollection,
        temperature: float = 1.0,
        entropy: bool = False,
        trained_only: bool = False,
        choices: Sequence[int] = (),
        values: int | None = None,
    ) -> None:
        """Choose the tokens after which the output layer is computed.

        Args:
            batch: Whole rows, on the model's device.
            groups: Process groups whose ranks share a vocabulary (tp) and a row (cp).
            temperature: Divisor of the logits.
            entropy: Whether to compute entropies.
            trained_only: Score only the tokens of `loss_mask`.
            choices: Tokens to score after the last token of each sample, instead of the batch's.
            values: Compute values instead, with the output layer's row of this token.
        """
        self.batch, self.groups = batch, groups
        self.temperature, self.entropy, self.choices = temperature, entropy, choices
        self.values = values
        self.scored = batch.loss_mask if trained_only else batch.predicted
        ranks, length = groups.cp.size(), batch.length // groups.cp.size()
        device = batch.tokens.device
        places = [sequence_positions(length, rank, ranks, device) for rank in range(ranks)]
        self.places = places[groups.cp.rank()]  # positions of this rank's tokens in their rows
        self._order = torch.cat(places).argsort()
        before = batch.last if choices else F.pad(self.scored, (0, 1))[:, 1:]
        self._index = before[:, self.places].T.flatten().nonzero().flatten()
        if not len(self._index):  # the output layer takes part in every backward pass
            self._index = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(
        self,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Any,
        scale_logits: Any,
        **_: Any,
    ) -> Tensor:
        """Score the tokens that follow the chosen tokens of this rank.

        Returns:
            fp32 `[length of this rank, rows, 1 or 2]`: log-probabilities, and entropies if they are
            computed; or `[length of this rank, rows, choices]`; or values, `[length of this rank,
            rows, 1]`. Positions that are not chosen have 0.
        """
        if self.values is not None:
            weight = output_layer.weight if output_weight is None else output_weight
            spread = output_layer.sequence_parallel
            return row_values(hidden_states, weight, self.values, self.groups.tp, spread)
        logits = self._logits(hidden_states, output_layer, output_weight)
        logits = scale_logits(logits).float()  # [chosen, 1, vocabulary part]
        if self.temperature != 1:  # a division of all logits takes a noticeable part of a step
            logits = logits / self.temperature
        if self.choices:
            scores = vocab_parallel_log_probs(logits, self.choices, self.groups.tp).squeeze(1)
        else:
            targets = F.pad(self.batch.tokens, (0, 1))[:, 1:][:, self.places].T.flatten()
            targets = targets[self._index].unsqueeze(1)
            kinds = [vocab_parallel_entropy(logits, self.groups.tp)] if self.entropy else []
            # Last: the cross entropy overwrites the logits with values for its backward pass.
            kinds.insert(0, -vocab_parallel_cross_entropy(logits, targets))
            scores = torch.stack(kinds, dim=-1).squeeze(1)
        rows, length = self.batch.rows, len(self.places)
        every = scores.new_zeros(length * rows, scores.shape[-1])
        return every.index_copy(0, self._index, scores).view(length, rows, -1)

    def _logits(self, hidden_states: Tensor, output_layer: Any, output_weight: Any) -> Tensor:
        """Return the logits after the chosen tokens, `[chosen, 1, vocabulary part]`."""
        spread = output_layer.sequence_parallel
        if spread:
            # The output layer sums gradients over the ranks if its input is not divided among them.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        chosen = hidden_states.flatten(0, 1).index_select(0, self._index).unsqueeze(1)
        output_layer.sequence_parallel = False
        try:
            logits, _ = output_layer(chosen, weight=output_weight)
        finally:
            output_layer.sequence_parallel = spread
        return logits

    def scores(self, scores: Tensor) -> TokenScores:
        """Return the scores of whole rows, at the scored tokens, on every rank that shares them.

        Gradients flow back to the rank that computed a score.
        """
        return align_scores(self.whole(scores), self.scored, self.values is not None)

    def whole(self, scores: Tensor) -> Tensor:
        """Return the scores of whole rows, on every rank that shares them.

        Returns:
            `[kinds, rows, length]`, each at the position of the token before the scored one.
        """
        if self.groups.cp.size() > 1:
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self.groups.cp
            )[self._order]
        return scores.permute(2, 1, 0)


def row_values(
    hidden_states: Tensor, weight: Tensor, token: int, group: dist.ProcessGroup, spread: bool
) -> Tensor:
    """Return products of hidden states with one row of a divided output layer, in fp32.

    Other rows are not computed, and a soft cap of logits, for example, does not apply.

    Args:
        hidden_states: Last hidden states, `[length, rows, hidden]`.
        weight: Output layer of this rank, `[vocabulary of this rank, hidden]`.
        token: Token of the row.
        group: Process group whose ranks divide the vocabulary.
        spread: Whether the ranks also divide the length.

    Returns:
        fp32 `[whole length, rows, 1]`.
    """
    if spread:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    place = token - group.rank() * len(weight)
    owned = 0 <= place < len(weight)
    # Other ranks multiply by 0, so that they take part in the collectives of the backward pass.
    row = weight[place if owned else 0].float() * owned
    part = (hidden_states.float() @ row).unsqueeze(-1)
    return reduce_from_tensor_model_parallel_region(part, group=group)


@torch.no_grad()
def vocab_parallel_log_probs(
    logits: Tensor, tokens: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Return log-probabilities of some tokens, with the vocabulary divided among ranks.

    Args:
        logits: fp32 `[..., vocabulary of this rank]`, -inf for tokens that cannot be sampled.
        tokens: Token ids.
        group: Process group whose ranks divide the vocabulary.

    Returns:
        fp32 `[..., tokens]`, nats.
    """
    size = logits.shape[-1]
    first = group.rank() * size
    largest = logits.amax(dim=-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    parts = [(logits - largest).exp().sum(dim=-1)]
    for token in tokens:
        owned = first <= token < first + size
        parts.append(logits[..., token - first] if owned else torch.zeros_like(parts[0]))
    sums = torch.stack(parts, dim=-1)
    dist.all_reduce(sums, group=group)
    return sums[..., 1:] - sums[..., :1].log() - largest


def vocab_parallel_entropy(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the entropy of distributions, with the vocabulary divided among ranks.

    Args:
        logits: fp32 `[..., vocabulary of this rank]`, -inf for tokens that cannot be sampled.
        group: Process group whose ranks divide the vocabulary.

    Returns:
        fp32 `[...]`, nats.
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
