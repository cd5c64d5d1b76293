"""Access to the tensors of a model in memory by their Hugging Face names, with any layout of ranks.

The position of a rank's part in a tensor comes from the sharded state dict of the model, which
Megatron's checkpoints use, too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture
from megatron_ext.hf.families import Family
from megatron_ext.hf.names import TensorLayout, TensorLink, join, split
from megatron_ext.hf.sources import AVERAGE, THRESHOLDS, UPDATES
from megatron_ext.moe.thresholds import Thresholds

# With these settings every layer has its own name, and every part a position in a complete tensor.
_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

Key = tuple[str, int | None]
"""Name in Megatron, and the index of an expert."""


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor, and the rank that sends it."""

    rank: int
    place: tuple[slice, ...]
    dtype: torch.dtype


class LiveTensors:
    """Tensors of a model that is distributed over ranks. All ranks must make the same calls."""

    def __init__(
        self, stages: Sequence[torch.nn.Module], model: Architecture, family: Family
    ) -> None:
        """Collect which rank has which part of each tensor.

        Args:
            stages: This rank's part of the model, without wrappers.
            model: Architecture of the whole model.
            family: Family whose tensor names are used.
        """
        self._model, self._links = model, family.links(model)
        self._stages = stages
        self._parts: dict[Key, list[tuple[tuple[slice, ...], Tensor]]] = defaultdict(list)
        own_pieces: list[tuple[Key, _Piece]] = []
        for shard in chain.from_iterable(_shards(stage) for stage in stages):
            place = shard.global_slice()
            expert = next((part for part in place if isinstance(part, int)), None)
            key = (shard.key, expert)
            where = tuple(part for part in place if isinstance(part, slice))
            assert shard.data is not None
            self._parts[key].append((where, shard.data))
            if is_main_replica(shard.replica_id):
                own_pieces.append((key, _Piece(dist.get_rank(), where, shard.dtype)))
        gathered: list[list[tuple[Key, _Piece]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own_pieces)
        self._pieces: dict[Key, list[_Piece]] = defaultdict(list)
        for key, piece in chain.from_iterable(gathered):
            self._pieces[key].append(piece)
        rows = [
            piece.place[0].stop for piece in self._pieces["embedding.word_embeddings.weight", None]
        ]
        self._rows = max(rows)

    @property
    def needed(self) -> list[str]:
        """Names of the tensors that this rank has a part of, in order."""
        links = (link for link in self._links if (link.key, link.expert) in self._parts)
        return [name for link in links for name, _ in link.parts]

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy complete tensors into the model, each rank its parts.

        Args:
            tensors: Names and tensors, in any order.

        Raises:
            UserError: A tensor is missing or has another shape.
        """
        place = {
            name: (link, number)
            for link in self._links
            for number, (name, _) in enumerate(link.parts)
        }
        left, pending = set(self.needed), defaultdict[Key, dict[int, Tensor]](dict)
        for name, tensor in tensors:
            if name not in left:
                continue
            link, number = place[name]
            if tuple(tensor.shape) != link.parts[number][1]:
                raise UserError(
                    f"{name} has shape {tuple(tensor.shape)} where {link.parts[number][1]} is "
                    "expected. Load the weights of the same model."
                )
            left.discard(name)
            key = (link.key, link.expert)
            pending[key][number] = tensor
            if len(pending[key]) == len(link.parts):
                parts = pending.pop(key)
                full = join(link, [parts[i] for i in range(len(parts))], self._model, self._rows)
                for where, part in self._parts[key]:
                    part.copy_(full[where])
        if left:
            raise UserError(
                f"The tensor {min(left)} of the model is missing. Load the weights of the same "
                "model."
            )
        for module in chain.from_iterable(stage.modules() for stage in self._stages):
            if isinstance(module, Thresholds):
                module.forget_count()
                module.restart_filter()

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and complete tensors on every rank, with the thresholds after their state."""
        state: dict[str, Tensor] = {}
        for link in self._links:
            full = self._gather(link)
            for (name, _), tensor in zip(link.parts, split(link, full, self._model)):
                yield name, tensor
                if name.endswith((AVERAGE, UPDATES)):
                    state[name] = tensor
                if name.endswith(UPDATES):
                    average = name.replace(UPDATES, AVERAGE)
                    yield name.replace(UPDATES, THRESHOLDS), self._value(state[average], tensor)

    def _value(self, average: Tensor, updates: Tensor) -> Tensor:
        thresholds = Thresholds(self._model.experts, self._model.ema_decay, average.device)
        thresholds.load_state_dict({"average": average, "updates": updates})
        return thresholds.value()

    def _gather(self, link: TensorLink) -> Tensor:
        key = (link.key, link.expert)
        pieces = self._pieces[key]
        shape: tuple[int, ...] = link.shape
        if link.layout is TensorLayout.VOCABULARY:
            shape = (self._rows, *shape[1:])
        device = torch.cuda.current_device()
        full = torch.empty(shape, dtype=pieces[0].dtype, device=device)
        local_parts = dict(self._parts.get(key, []))
        for piece in pieces:
            part = local_parts.get(piece.place) if piece.rank == dist.get_rank() else None
            buffer = torch.empty_like(full[piece.place]) if part is None else part.contiguous()
            dist.broadcast(buffer, src=piece.rank)
            full[piece.place] = buffer
        return full


def _shards(stage: torch.nn.Module) -> list[ShardedTensor]:
    state = stage.sharded_state_dict(metadata=_METADATA)  # type: ignore[operator]
    apply_factories(state)
    return [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
