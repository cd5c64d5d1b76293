"""Self-attention that also runs against this project's cache."""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.inference.cache import RaggedCache


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention; in inference, tokens of many rows at their own positions.

    Megatron's static cache holds keys that are not rotated and rotates all of them again for each
    token, and wants all rows at one position; its dynamic one needs flash-attn.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the base class; with a `RaggedCache`, `hidden_states` is `[tokens, 1, hidden]`."""
        cache = kwargs.get("inference_context")
        if not isinstance(cache, RaggedCache):
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        table = kwargs.get("rotary_pos_emb")
        rotated = not (self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1])
        if table is not None and rotated:
            both = cache.rotate(
                torch.cat((query, key), dim=2),
                table,
                self._yarn_concentration_factor,
                self.config.rotary_interleaved,
            )
            query, key = both[:, :, : query.shape[2]], both[:, :, query.shape[2] :]
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        context = cache.attend(self.layer_number, query, key, value, self.config.softmax_scale)
        return self.linear_proj(context.unsqueeze(1))
