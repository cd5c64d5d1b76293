"""Scores of tokens by a model of transformers: log-probabilities, entropies and values.

The output layer is computed only in the columns of a micro-batch where a token is scored.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.engines.batch import TokenBatch
from alignment.engines.deepspeed_launch import check_samples_per_row
from alignment.engines.protocol import TokenScores, align_scores
from megatron_ext.inference.sampling import log_probs_of


class CausalScorer:
    """Scores of micro-batches, with gradients unless they are turned off."""

    def __init__(self, engine: Any, dtype: torch.dtype) -> None:
        """Create the scorer.

        Args:
            engine: DeepSpeed's engine of the model.
            dtype: Dtype in which the model computes.
        """
        self.engine, self.dtype = engine, dtype

    def token_scores(
        self, batch: TokenBatch, temperature: float, entropy: bool, trained_only: bool
    ) -> TokenScores:
        """Return log-probabilities, and entropies; see `AlignmentEngine.log_probs`."""
        scored = batch.loss_mask if trained_only else batch.predicted
        places = _places_before(scored)
        targets = F.pad(batch.tokens, (0, 1))[:, 1:][:, places]
        logits = self._logits(batch, places)
        if temperature != 1:  # a division of all logits takes a noticeable part of a step
            logits = logits / temperature
        kinds = [log_probs_of(logits.flatten(0, 1), targets.flatten()).view_as(targets)]
        if entropy:
            table = logits.log_softmax(dim=-1)
            kinds.append(-(table.exp() * table).sum(dim=-1))
        every = logits.new_zeros(len(kinds), *batch.tokens.shape)
        return align_scores(every.index_copy(2, places, torch.stack(kinds)), scored)

    def next_log_probs(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        """Return `[rows, length, tokens]`; see `AlignmentEngine.next_log_probs`."""
        places = _columns(batch.last)
        logits = self._logits(batch, places)
        scores = logits[..., list(tokens)] - logits.logsumexp(-1, keepdim=True)
        every = scores.new_zeros(*batch.tokens.shape, len(tokens))
        return every.index_copy(1, places, scores) * batch.last.unsqueeze(-1)

    def values(self, batch: TokenBatch, token: int, trained_only: bool) -> TokenScores:
        """Return a critic's values; see `AlignmentEngine.values`."""
        scored = batch.loss_mask if trained_only else batch.predicted
        places = _places_before(scored)
        # Read the values from the output layer, before a soft cap of the logits for example.
        outputs: list[Tensor] = []
        head = self.engine.module.get_output_embeddings()
        hook = head.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
        self._logits(batch, places)
        hook.remove()
        values = outputs[0][..., token].float()
        every = values.new_zeros(1, *batch.tokens.shape)
        return align_scores(every.index_copy(2, places, values.unsqueeze(0)), scored, values=True)

    def _logits(self, batch: TokenBatch, places: Tensor) -> Tensor:
        """Return the logits after the tokens at some positions of every row.

        Returns:
            fp32 `[rows, places, vocabulary]`.
        """
        mask = None
        positions = torch.arange(batch.length, device=batch.tokens.device).expand(batch.rows, -1)
        if batch.is_packed:
            check_samples_per_row(self.engine.module.config)
            mask, positions = self._mask(batch), batch.positions
        output = self.engine(
            input_ids=batch.tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=places,
        )
        return output.logits.float()

    def _mask(self, batch: TokenBatch) -> Any:
        """Return the attention mask of packed rows: a token attends to its sample, up to itself."""
        from transformers.masking_utils import create_masks_for_generate

        device = batch.tokens.device
        config = self.engine.module.config.get_text_config()
        if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
            # One mask per kind of layer. transformers distinguishes samples by their positions.
            sizes = torch.empty(*batch.tokens.shape, 0, dtype=self.dtype, device=device)
            return create_masks_for_generate(config, sizes, None, None, batch.positions)
        places = torch.arange(batch.length, device=device)
        visible = batch.samples.unsqueeze(2) == batch.samples.unsqueeze(1)
        visible = visible & (places.unsqueeze(1) >= places)  # [rows, queries, keys]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=device)
        return mask.masked_fill(~visible, torch.finfo(self.dtype).min).unsqueeze(1)


def _places_before(scored: Tensor) -> Tensor:
    """Return the columns that precede a scored token in any row."""
    return _columns(F.pad(scored, (0, 1))[:, 1:])


def _columns(mask: Tensor) -> Tensor:
    """Return the columns in which a mask is set in any row, or else the first column."""
    places = mask.any(dim=0).nonzero().flatten()
    return places if len(places) else places.new_zeros(1)
