"""Keys and values of rows of any lengths, and attention of new tokens to them.

One forward pass takes some tokens of some rows, laid end to end as one sequence `[tokens, 1]`, so
that rows that begin, rows inside a long prompt and rows that go on run through the model together.
Only attention knows whose tokens they are: rows with one new token attend in one batch, each other
row by itself.
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

_FIRST_LENGTH = 64  # tokens of a slot, before any row is longer


@dataclass(frozen=True)
class TokenChunk:
    """The next tokens of one row.

    Attributes:
        slot: the row's place in the cache.
        start: how many of the row's tokens are in the cache already.
        tokens: those that come.
        wanted: after how many of the last of them logits are asked for.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class RaggedCache(BaseInferenceContext):
    """The cache of one pipeline stage. Its memory grows with the rows, never above the bounds."""

    # What Megatron's GPTModel asks a context that is not of its static kind.
    num_speculative_tokens = 0

    def __init__(self, max_slots: int, max_length: int) -> None:
        super().__init__(InferenceConfig(materialize_only_last_token_logits=True))
        self.max_slots, self.max_sequence_length = max_slots, max_length
        self._size = (1, min(_FIRST_LENGTH, max_length))
        # Of each layer, keys (rotated) and values `[slots, kv_heads, length, head_dim]`.
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        # Of the present pass: cosines and sines, and where keys go.
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._places: Tensor | None = None

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return False

    def move(self, source: int, target: int) -> None:
        """Put a slot in another's place."""
        for keys, values in self._memory.values():
            keys[target], values[target] = keys[source], values[source]

    def lay_out(self, chunks: Sequence[TokenChunk], device: torch.device | int) -> Tensor:
        """Prepare for a pass with the tokens of `chunks`, those of one token first.

        Returns:
            tokens, int64 `[1, tokens]`.
        """
        assert all(len(a.tokens) == 1 or len(b.tokens) > 1 for a, b in pairwise(chunks))
        self._grow(1 + max(c.slot for c in chunks), max(c.end for c in chunks))
        positions = [p for c in chunks for p in range(c.start, c.end)]
        slots = [c.slot for c in chunks for _ in c.tokens]
        single = [c for c in chunks if len(c.tokens) == 1]
        self._long = chunks[len(single) :]
        first = 0
        self._wanted: list[int] = []
        for chunk in chunks:
            first += len(chunk.tokens)
            self._wanted += range(first - chunk.wanted, first)
        self.positions = torch.tensor([positions], device=device)
        self._slot_of = torch.tensor(slots, device=device)
        self._rotation = self._places = None
        self._lay_out_single([c.slot for c in single], [c.end for c in single], device)
        return torch.tensor([[token for c in chunks for token in c.tokens]], device=device)

    def _lay_out_single(
        self, slots: list[int], ends: list[int], device: torch.device | int
    ) -> None:
        self._slots: slice | Tensor = slice(0, len(slots))
        self._mask: Tensor | None = None
        self._seen = max(ends, default=0)
        if not slots:
            return
        if slots == list(range(slots[0], slots[0] + len(slots))):
            self._slots = slice(slots[0], slots[0] + len(slots))  # no copy
        else:
            self._slots = torch.tensor(slots, device=device)
        if min(ends) < self._seen:
            seen = torch.arange(self._seen, device=device) < torch.tensor(
                ends, device=device
            ).unsqueeze(1)
            self._mask = torch.zeros(len(slots), 1, 1, self._seen, device=device)
            self._mask.masked_fill_(~seen[:, None, None], -torch.inf)

    def _grow(self, slots: int, length: int) -> None:
        assert slots <= self.max_slots and length <= self.max_sequence_length
        slots_now, length_now = self._size
        if slots > slots_now:
            slots_now = min(max(slots, 2 * slots_now), self.max_slots)
        if length > length_now:
            length_now = min(max(length, 2 * length_now), self.max_sequence_length)
        self._size = (slots_now, length_now)

    def rotate(self, heads: Tensor, table: Tensor, scale: float, interleaved: bool) -> Tensor:
        """Rotate queries or keys to their positions.

        Args:
            heads: `[tokens, 1, heads, head_dim]`.
            table: Megatron's angles of all positions, `[positions, 1, 1, dim]`, dim <= head_dim.
            scale: of what is rotated.
            interleaved: whether neighbours are rotated together, not halves.
        """
        if self._rotation is None:  # the same for all layers of a pass
            angles = table[self.positions[0]]
            self._rotation = (angles.cos() * scale, angles.sin() * scale)
        cos, sin = (x.to(heads.dtype) for x in self._rotation)
        turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        turned = torch.addcmul(turned * cos, _rotate_half(turned, interleaved), sin)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    def last_token_logits(self, hidden: Tensor) -> Tensor:
        """Megatron's name for it: of `[1, tokens, hidden]` what logits are asked for."""
        return hidden[0, self._wanted]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """Keep the new keys and values, and attend to all of each token's row up to itself.

        Args:
            query: `[tokens, heads, head_dim]`, rotated.
            key: `[tokens, kv_heads, head_dim]`, rotated.
            value: as `key`.

        Returns:
            `[tokens, heads * head_dim]`.
        """
        keys, values = self._room(layer, key)
        if self._places is None:  # the same for all layers of a pass
            kv_heads, length = keys.shape[1:3]
            heads = torch.arange(kv_heads, device=key.device)
            place = self._slot_of.unsqueeze(1) * kv_heads + heads  # [tokens, kv_heads]
            self._places = (place * length + self.positions.T).flatten()
        keys.flatten(0, 2).index_copy_(0, self._places, key.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self._places, value.flatten(0, 1))
        parts, first = [], len(query) - sum(len(chunk.tokens) for chunk in self._long)
        if first:
            parts.append(self._attend_single(query[:first], keys, values, scale))
        for chunk in self._long:
            last = first + len(chunk.tokens)
            row = (chunk.slot, slice(None), slice(0, chunk.end))
            parts.append(_attend_long(query[first:last], keys[row], values[row], scale))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_single(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> Tensor:
        heads, kv_heads = query.shape[1], keys.shape[1]
        # Query heads that share a key head are its queries: [rows, kv_heads, group, head_dim].
        grouped = query.view(len(query), kv_heads, heads // kv_heads, -1)
        mask = None if self._mask is None else self._mask.to(query.dtype)
        output = F.scaled_dot_product_attention(
            grouped,
            keys[self._slots, :, : self._seen],
            values[self._slots, :, : self._seen],
            attn_mask=mask,
            scale=scale,
        )
        return output.flatten(1)

    def _room(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        now = self._memory.get(layer)
        slots, length = self._size
        shape = (slots, like.shape[1], length, like.shape[2])
        if now is None or now[0].shape != shape:
            # Zeros, because what is masked out must still be finite.
            keys, values = (like.new_zeros(shape) for _ in range(2))
            if now is not None:
                for new, old in zip((keys, values), now):
                    new[: old.shape[0], :, : old.shape[2]] = old
            self._memory[layer] = (keys, values)
        return self._memory[layer]


def _attend_long(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Attention of the last tokens of one row to all of it.

    Args:
        query: `[new, heads, head_dim]`.
        keys: `[kv_heads, all, head_dim]`.
        values: as `keys`.

    Returns:
        `[new, heads * head_dim]`.
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
