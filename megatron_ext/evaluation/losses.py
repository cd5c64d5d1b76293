"""The loss of a model on an indexed dataset, a window of the text after the other.

The dataset is one stream of tokens, documents end to end, cut into windows of one length that
follow each other without overlap. Each token but the stream's first is predicted once, from those
before it in its window and the last of the window before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_ext.errors import UserError
from megatron_ext.evaluation.log_likelihoods import ScoringRequest, batch_of, merged
from megatron_ext.evaluation.models import MegatronModel
from megatron_ext.evaluation.routing_modes import RoutingMode
from megatron_ext.evaluation.text_losses import TextCodec


class Windows:
    """A stream of tokens in windows.

    Args:
        prefix: of the dataset's .bin and .idx files.
        length: tokens that a window predicts; the last one may have fewer.
        most: how many windows at most; None for all.

    Raises:
        UserError: there is no such dataset, or it has fewer than two tokens.
    """

    def __init__(self, prefix: str, length: int, most: int | None = None) -> None:
        if not IndexedDataset.exists(prefix) or not Path(prefix + ".bin").is_file():
            raise UserError(f"{prefix}.idx and .bin: give the prefix of an indexed dataset")
        self._data, self.length = IndexedDataset(prefix), length
        self._ends = np.cumsum(self._data.sequence_lengths, dtype=np.int64)
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        if tokens < 2:
            raise UserError(f"{prefix} has fewer than two tokens: there is nothing to predict")
        self.number = -(-(tokens - 1) // length)
        self.targets = tokens - 1
        if most is not None and most < self.number:
            self.number, self.targets = most, most * length

    def __getitem__(self, window: int) -> NDArray[np.int32]:
        """The token before a window and those of it, `[length + 1]` or fewer."""
        start = window * self.length
        return self._read(start, min(start + self.length, self.targets) + 1)

    def _read(self, start: int, stop: int) -> NDArray[np.int32]:
        parts = [np.zeros(0, np.int32)]
        document = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[document]) - int(self._data.sequence_lengths[document])
            end = min(stop, int(self._ends[document]))
            if start < end:
                part = self._data.get(document, offset=start - first, length=end - start)
                parts.append(part.astype(np.int32))
                start = end
            document += 1
        return np.concatenate(parts)

    def text_bytes(self, codec: TextCodec) -> int:
        """UTF-8 bytes of what the windows predict; the end of a document has none."""
        total = 0
        document: list[int] = []
        for window in range(self.number):
            for token in self[window][1:].tolist():
                if token == codec.end:
                    total += len(codec.decode(document).encode())
                    document = []
                else:
                    document.append(token)
        return total + len(codec.decode(document).encode())


@dataclass(frozen=True)
class Losses:
    """Losses by window.

    Attributes:
        sums: nats, fp64 `[windows]`.
        tokens: how many each sum has, `[windows]`.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, with windows as what was drawn; None for a single one."""
        return _standard_error(self.sums, self.tokens)

    def minus(self, other: "Losses") -> tuple[float, float | None]:
        """Difference of the means and its standard error, window by window."""
        return self.mean - other.mean, _standard_error(self.sums - other.sums, self.tokens)


def _standard_error(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float | None:
    """Of a ratio of sums, to first order."""
    n = len(sums)
    if n < 2:
        return None
    residuals = sums - tokens * (sums.sum() / tokens.sum())
    return math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(tokens.sum())


def window_losses(
    model: MegatronModel,
    windows: Windows,
    routing: RoutingMode,
    rows: int,
    done: Callable[[int], None] = lambda windows: None,
) -> Losses:
    """Losses under a routing; every rank must call it and gets the same.

    Args:
        rows: windows of a batch; of a pool where the routing has pools, whose windows the copies
            of the model then share.
        done: told how many more windows are done.
    """
    own: dict[int, float] = {}
    with routing.applied():
        for turn in _turns(windows.number, rows, model.replicas.number, routing.pooled):
            mine = turn[model.replicas.own]
            own.update(_losses(model, windows, routing, mine, mine.start - turn[0].start))
            done(sum(map(len, turn)))
    sums = merged(own)
    tokens = [min(windows.length, windows.targets - i * windows.length) for i in sorted(sums)]
    return Losses(np.array([sums[i] for i in sorted(sums)]), np.array(tokens, dtype=np.float64))


def _turns(number: int, rows: int, copies: int, pooled: bool) -> list[list[range]]:
    """Which windows each copy of the model does at the same time."""
    whole = rows if pooled else rows * copies
    turns = []
    for start in range(0, number, whole):
        stop = min(start + whole, number)
        if pooled:
            cuts = [start + (stop - start) * copy // copies for copy in range(copies + 1)]
        else:
            cuts = [min(start + rows * copy, stop) for copy in range(copies + 1)]
        turns.append([range(a, b) for a, b in pairwise(cuts)])
    return turns


def _losses(
    model: MegatronModel, windows: Windows, routing: RoutingMode, mine: range, first: int
) -> dict[int, float]:
    """Sums of this copy's windows, on the ranks that know them; of none, it runs in step."""
    batch = batch_of([ScoringRequest(windows[i], 1) for i in mine])
    routing.set_batch(batch.padding, first, windows.length)
    log_probs = model.log_probs(batch)
    if log_probs is None:
        return {}
    sizes = [len(windows[i]) - 1 for i in mine]
    parts = log_probs[0].cpu().split(sizes)
    return {i: -float(part.sum(dtype=torch.float64)) for i, part in zip(mine, parts)}


def summary(
    losses: Losses, base: Losses, routing: RoutingMode, text_bytes: int | None
) -> dict[str, Any]:
    """Figures of one routing; every rank must ask.

    Args:
        base: the losses that the gap is the difference from.
        text_bytes: of what was predicted, None if unknown.
    """
    layers = routing.figures()
    nats = float(losses.sums.sum())
    gap, gap_error = losses.minus(base)
    figures: dict[str, Any] = {
        "routing": routing.name,
        "loss": losses.mean,
        "standard_error": losses.standard_error,
        "perplexity": math.exp(losses.mean),
        "gap": gap,
        "gap_standard_error": gap_error,
        "nats_per_byte": nats / text_bytes if text_bytes else None,
        "bits_per_byte": nats / text_bytes / math.log(2) if text_bytes else None,
        "fan_out": None,
        "max_load": None,
        "layers": layers,
    }
    if layers:
        figures["fan_out"] = sum(f["fan_out"] for f in layers.values()) / len(layers)
        figures["max_load"] = max(f["load_max_over_mean"] for f in layers.values())
    return figures
