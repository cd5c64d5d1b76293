"""Layers with a state of fixed size in place of attention, also with this project's cache.

In inference the state and the last inputs of a convolution take the place of keys and values.
"""

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.inference.cache import RaggedCache


class RecurrentLayer:
    """Cache and samples of a recurrent layer of Megatron, which is the next base class.

    Megatron's layers have no inference in torch, and process a row as one sample.
    """

    config: TransformerConfig
    layer_number: int | None
    pg_collection: ProcessGroupCollection
    in_proj: Any
    out_proj: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the layer.

        Args:
            hidden_states: `[length, rows, hidden]`, or `[tokens, 1, hidden]` with a cache.
            attention_mask: Sample of every token, see `SDPAttention`, or None.
            kwargs: Further arguments of attention. `inference_context` may be a `RaggedCache`; the
                others have no effect.

        Returns:
            Output like `hidden_states`, and a bias or None.

        Raises:
            UserError: Rows have several samples, and their tokens are on several ranks.
        """
        cache = kwargs.get("inference_context")
        if isinstance(cache, RaggedCache):
            return self.out_proj(self._infer(hidden_states, cache).unsqueeze(1))
        if attention_mask is None:
            return self._run(hidden_states)
        if self.config.sequence_parallel or self.pg_collection.cp.size() > 1:
            raise UserError(
                "Several samples per row of a model with Gated DeltaNet or Mamba layers require "
                "tensor and context parallel sizes of 1: a layer processes each sample as a row. "
                "Use data, expert or pipeline parallelism."
            )
        # A row for each sample, padded at its end.
        tokens = hidden_states.transpose(0, 1).flatten(0, 1)  # row by row
        sample, place = _samples_and_places(attention_mask)
        shape = (int(place.max()) + 1, int(sample.max()) + 1, hidden_states.shape[-1])
        apart = tokens.new_zeros(shape).index_put((place, sample), tokens)
        output, bias = self._run(apart)
        return output[place, sample].view(*attention_mask.shape, -1).transpose(0, 1), bias

    @abstractmethod
    def _run(self, hidden: Tensor) -> Any:
        """Run Megatron's layer on one sample per row, `[length, rows, hidden]`."""

    @abstractmethod
    def _empty_states(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return window and state of a row before its first token, see `_advance`.

        Args:
            projected: Tensor of the device and dtype of the window.

        Returns:
            `[1, channels, kernel - 1]`, and fp32 `[1, ...]`.
        """

    @abstractmethod
    def _advance(
        self, projected: Tensor, window: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Process the next tokens of rows.

        Args:
            projected: Output of the input projection, `[rows, tokens, dimension]`.
            window: Last inputs of the convolution, `[rows, channels, kernel - 1]`.
            state: States of the heads, fp32 `[rows, ...]`.

        Returns:
            Input of the output projection `[rows * tokens, dimension]`, next window, next state.
        """

    def _infer(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Return the input of the output projection, `[tokens, dimension]`."""
        assert self.layer_number is not None
        projected = self.in_proj(hidden)[0].squeeze(1)
        windows, states = cache.recurrent_states(self.layer_number, *self._empty_states(projected))
        outputs, first = [], cache.single_tokens
        if first:
            rows = cache.single_slots
            out, windows[rows], states[rows] = self._advance(
                projected[:first].unsqueeze(1), windows[rows], states[rows]
            )
            outputs.append(out)
        for chunk in cache.long_chunks:
            last = first + len(chunk.tokens)
            row = slice(chunk.slot, chunk.slot + 1)
            out, windows[row], states[row] = self._advance(
                projected[first:last].unsqueeze(0), windows[row], states[row]
            )
            outputs.append(out)
            first = last
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _samples_and_places(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each token's sample among all rows', and its place in the sample.

    Args:
        samples: int64 `[rows, length]`, numbers that differ between neighboring samples of a row.

    Returns:
        int64 `[rows * length]` each.
    """
    begins = torch.ones_like(samples, dtype=torch.bool)
    begins[:, 1:] = samples[:, 1:] != samples[:, :-1]
    sample = begins.flatten().cumsum(0) - 1
    first = begins.flatten().nonzero().squeeze(1)
    return sample, torch.arange(len(sample), device=sample.device) - first[sample]
