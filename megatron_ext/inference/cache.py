"""Cache for rows of different lengths, and attention of new tokens to it.

Layers with attention have keys and values in it, recurrent layers a state of fixed size.

One forward pass processes some tokens of some rows, concatenated to one sequence `[tokens, 1]`, so
that rows that begin, rows inside a long prompt and rows that continue run together. Only attention
distinguishes rows: those with one new token attend in one batch, every other row separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from torch import Tensor

_FIRST_LENGTH = 64  # initial length of a slot, in tokens


@dataclass(frozen=True)
class TokenChunk:
    """Next tokens of one row.

    Attributes:
        slot: Slot of the row in the cache.
        start: Number of the row's tokens that are in the cache already.
        tokens: The next tokens.
        scored: Number of the last tokens whose logits are computed.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    scored: int = 1

    @property
    def end(self) -> int:
        """Number of the row's tokens in the cache after the pass."""
        return self.start + len(self.tokens)


class RaggedCache(BaseInferenceContext):
    """Cache of one pipeline stage, whose memory grows with the rows up to its bounds.

    Attributes:
        single_tokens: Number of rows with one token in the current pass, which come first.
        single_slots: Slots of these rows.
        long_chunks: Chunks of the other rows.
    """

    # An attribute that Megatron's model reads.
    num_speculative_tokens = 0

    def __init__(self, max_slots: int, max_length: int) -> None:
        super().__init__(InferenceConfig(materialize_only_last_token_logits=True))
        self.max_slots, self.max_sequence_length = max_slots, max_length
        self._size = (1, min(_FIRST_LENGTH, max_length))
        # Keys (rotated) and values of each layer, `[slots, kv_heads, length, head_dim]`.
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        # States of each recurrent layer, `[slots, ...]`.
        self._states: dict[int, tuple[Tensor, ...]] = {}
        # State of the current pass: cosines and sines, and the positions of new keys.
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._places: Tensor | None = None

    def is_static_batching(self) -> bool:
        """Return False; see Megatron's base class."""
        return False

    def is_decode_only(self) -> bool:
        """Return False; see Megatron's base class."""
        return False

    def move(self, source: int, target: int) -> None:
        """Copy the content of a slot to another."""
        for pair in (*self._memory.values(), *self._states.values()):
            for memory in pair:
                memory[target] = memory[source]

    def lay_out(self, chunks: Sequence[TokenChunk], device: torch.device | int) -> Tensor:
        """Prepare a pass.

        Args:
            chunks: Next tokens of the rows; chunks of one token come first.
            device: Device of the model.

        Returns:
            All tokens, int64 `[1, tokens]`.
        """
        assert all(len(a.tokens) == 1 or len(b.tokens) > 1 for a, b in pairwise(chunks))
        self._grow(1 + max(c.slot for c in chunks), max(c.end for c in chunks))
        positions = [p for c in chunks for p in range(c.start, c.end)]
        slots = [c.slot for c in chunks for _ in c.tokens]
        single = [c for c in chunks if len(c.tokens) == 1]
        self.single_tokens = len(single)
        self.long_chunks = chunks[len(single) :]
        for chunk in chunks:
            if chunk.start == 0:  # another row may have had the slot
                for pair in self._states.values():
                    for memory in pair:
                        memory[chunk.slot : chunk.slot + 1] = 0
        first = 0
        self._scored: list[int] = []
        for chunk in chunks:
            first += len(chunk.tokens)
            self._scored += range(first - chunk.scored, first)
        self.positions = torch.tensor([positions], device=device)
        self._slot_of = torch.tensor(slots, device=device)
        self._rotation = self._places = None
        self._lay_out_single([c.slot for c in single], [c.end for c in single], device)
        return torch.tensor([[token for c in chunks for token in c.tokens]], device=device)

    def _lay_out_single(
        self, slots: list[int], ends: list[int], device: torch.device | int
    ) -> None:
        self.single_slots: slice | Tensor = slice(0, len(slots))
        self._mask: Tensor | None = None
        self._longest = max(ends, default=0)
        if not slots:
            return
        if slots == list(range(slots[0], slots[0] + len(slots))):
            self.single_slots = slice(slots[0], slots[0] + len(slots))  # no copy
        else:
            self.single_slots = torch.tensor(slots, device=device)
        if min(ends) < self._longest:
            visible = torch.arange(self._longest, device=device) < torch.tensor(
                ends, device=device
            ).unsqueeze(1)
            self._mask = torch.zeros(len(slots), 1, 1, self._longest, device=device)
            self._mask.masked_fill_(~visible[:, None, None], -torch.inf)

    def _grow(self, slots: int, length: int) -> None:
        assert slots <= self.max_slots and length <= self.max_sequence_length
        slots_now, length_now = self._size
        if slots > slots_now:
            slots_now = min(max(slots, 2 * slots_now), self.max_slots)
        if length > length_now:
            length_now = min(max(length, 2 * length_now), self.max_sequence_length)
        self._size = (slots_now, length_now)

    def rotate(self, heads: Tensor, table: Tensor, scale: float, interleaved: bool) -> Tensor:
        """Apply rotary embeddings to queries or keys.

        Args:
            heads: Queries or keys, `[tokens, 1, heads, head_dim]`.
            table: Megatron's angles of all positions, `[positions, 1, 1, dim]`, dim <= head_dim.
            scale: Factor of the rotated channels.
            interleaved: Whether neighboring channels are rotated together, and not halves.
        """
        if self._rotation is None:  # the same for all layers of a pass
            angles = table[self.positions[0]]
            self._rotation = (angles.cos() * scale, angles.sin() * scale)
        cos, sin = (x.to(heads.dtype) for x in self._rotation)
        turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        turned = torch.addcmul(turned * cos, _rotate_half(turned, interleaved), sin)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """Select the hidden states whose logits are computed; Megatron defines the name.

        Args:
            hidden: Hidden states, `[1, tokens, hidden]`.
        """
        return hidden[0, self._scored]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """Store the new keys and values, and compute causal attention within each row.

        Args:
            layer: Number of the layer.
            query: Rotated queries, `[tokens, heads, head_dim]`.
            key: Rotated keys, `[tokens, kv_heads, head_dim]`.
            value: Values, `[tokens, kv_heads, head_dim]`.
            scale: Factor of the attention scores. Default: 1 / sqrt(head_dim).

        Returns:
            Output, `[tokens, heads * head_dim]`.
        """
        keys, values = self._memory_of(layer, key)
        if self._places is None:  # the same for all layers of a pass
            kv_heads, length = keys.shape[1:3]
            heads = torch.arange(kv_heads, device=key.device)
            place = self._slot_of.unsqueeze(1) * kv_heads + heads  # [tokens, kv_heads]
            self._places = (place * length + self.positions.T).flatten()
        keys.flatten(0, 2).index_copy_(0, self._places, key.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self._places, value.flatten(0, 1))
        parts, first = [], self.single_tokens
        if first:
            parts.append(self._attend_single(query[:first], keys, values, scale))
        for chunk in self.long_chunks:
            last = first + len(chunk.tokens)
            row = (chunk.slot, slice(None), slice(0, chunk.end))
            parts.append(_attend_long(query[first:last], keys[row], values[row], scale))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def recurrent_states(self, layer: int, *empty: Tensor) -> tuple[Tensor, ...]:
        """Return the states of all slots of a layer, for the layer to change in place.

        Args:
            layer: Number of the layer.
            empty: States of a row before its first token, `[1, ...]` each.

        Returns:
            A tensor `[slots, ...]` for each of them.
        """
        current = self._states.get(layer)
        slots = self._size[0]
        if current is None or len(current[0]) < slots:
            states = tuple(state.repeat(slots, *[1] * (state.dim() - 1)) for state in empty)
            if current is not None:
                for new, old in zip(states, current):
                    new[: len(old)] = old
            self._states[layer] = states
        return self._states[layer]

    def _attend_single(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> Tensor:
        heads, kv_heads = query.shape[1], keys.shape[1]
        # Query heads that share a key head are its queries: [rows, kv_heads, group, head_dim].
        grouped = query.view(len(query), kv_heads, heads // kv_heads, -1)
        mask = None if self._mask is None else self._mask.to(query.dtype)
        output = F.scaled_dot_product_attention(
            grouped,
            keys[self.single_slots, :, : self._longest],
            values[self.single_slots, :, : self._longest],
            attn_mask=mask,
            scale=scale,
        )
        return output.flatten(1)

    def _memory_of(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, enlarged if necessary."""
        current = self._memory.get(layer)
        slots, length = self._size
        shape = (slots, key.shape[1], length, key.shape[2])
        if current is None or current[0].shape != shape:
            # Zeros, because masked values must be finite.
            keys, values = (key.new_zeros(shape) for _ in range(2))
            if current is not None:
                for new, old in zip((keys, values), current):
                    new[: old.shape[0], :, : old.shape[2]] = old
            self._memory[layer] = (keys, values)
        return self._memory[layer]


def _attend_long(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Compute attention of the last tokens of one row to the whole row.

    Args:
        query: Queries of the new tokens, `[new, heads, head_dim]`.
        keys: Keys of the row, `[kv_heads, all, head_dim]`.
        values: Values of the row, `[kv_heads, all, head_dim]`.
        scale: Factor of the attention scores. Default: 1 / sqrt(head_dim).

    Returns:
        Output, `[new, heads * head_dim]`.
    """
    new, length = len(query), keys.shape[1]
    mask = None
    if new < length:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )  # [1, heads, new, head_dim]
    return output[0].transpose(0, 1).flatten(1)
