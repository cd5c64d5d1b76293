"""Loss of a model on an indexed dataset, divided into windows.

The dataset is one stream of tokens, its documents concatenated, which is divided into consecutive
windows of equal length. Every token except the first of the stream is predicted once, from the
preceding tokens of its window and the last token of the previous window.
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
from megatron_ext.evaluation.text_codec import TextCodec


class Windows:
    """Windows of a stream of tokens.

    Attributes:
        length: Number of tokens that a window predicts; the last window may have fewer.
        number: Number of windows.
        targets: Number of tokens that all windows predict.
    """

    def __init__(self, prefix: str, length: int, max_windows: int | None = None) -> None:
        """Open a dataset.

        Args:
            prefix: Path of the dataset without .bin.
            length: Number of tokens that a window predicts.
            max_windows: Maximum number of windows; None for all.

        Raises:
            UserError: The dataset does not exist, or has fewer than two tokens.
        """
        if not IndexedDataset.exists(prefix) or not Path(prefix + ".bin").is_file():
            raise UserError(
                f"{prefix}.idx or {prefix}.bin does not exist. Give the prefix of an indexed "
                "dataset."
            )
        self._data, self.length = IndexedDataset(prefix), length
        self._ends = np.cumsum(self._data.sequence_lengths, dtype=np.int64)
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        if tokens < 2:
            raise UserError(
                f"{prefix} has fewer than two tokens, so there is nothing to predict. Give a "
                "larger dataset."
            )
        self.number = -(-(tokens - 1) // length)
        self.targets = tokens - 1
        if max_windows is not None and max_windows < self.number:
            self.number, self.targets = max_windows, max_windows * length

    def __getitem__(self, window: int) -> NDArray[np.int32]:
        """Return the token before a window and its tokens, `[length + 1]` or fewer."""
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
        """Return the UTF-8 bytes that the windows predict; special tokens have none."""
        total = 0
        document: list[int] = []
        for window in range(self.number):
            for token in self[window][1:].tolist():
                if token == codec.end:
                    total += codec.text_bytes(document)
                    document = []
                else:
                    document.append(token)
        return total + codec.text_bytes(document)


@dataclass(frozen=True)
class Losses:
    """Losses of windows.

    Attributes:
        sums: Sum of the losses of each window in nats, fp64 `[windows]`.
        tokens: Number of tokens of each window, `[windows]`.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean loss, in nats per token."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean, with windows as samples; None for a single window."""
        return _standard_error(self.sums, self.tokens)

    def minus(self, other: "Losses") -> tuple[float, float | None]:
        """Return the difference of the means and its standard error, computed by window."""
        return self.mean - other.mean, _standard_error(self.sums - other.sums, self.tokens)


def _standard_error(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float | None:
    """Return the standard error of a ratio of sums, to first order."""
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
    """Compute losses with a way of routing. Every rank must call it and gets the same result.

    Args:
        model: The model.
        windows: The data.
        routing: Way of routing.
        rows: Windows per batch. If the routing has pools, windows per pool, which the replicas of
            the model share.
        done: Callback that receives the number of windows finished since its last call.

    Raises:
        UserError: A loss is not finite.
    """
    local_sums: dict[int, float] = {}
    with routing.applied():
        for turn in _turns(windows.number, rows, model.replicas.number, routing.pooled):
            local_windows = turn[model.replicas.index]
            first = local_windows.start - turn[0].start
            local_sums.update(_losses(model, windows, routing, local_windows, first))
            done(sum(map(len, turn)))
    sums = merged(local_sums)
    if broken := sum(not math.isfinite(value) for value in sums.values()):
        raise UserError(
            f"The loss of {broken:,} of {len(sums):,} sequences is not finite with the routing "
            f"{routing.name}. The weights of the model have diverged or are damaged. Use an "
            "earlier checkpoint."
        )
    tokens = [min(windows.length, windows.targets - i * windows.length) for i in sorted(sums)]
    return Losses(np.array([sums[i] for i in sorted(sums)]), np.array(tokens, dtype=np.float64))


def _turns(number: int, rows: int, copies: int, pooled: bool) -> list[list[range]]:
    """Return the windows that the replicas process at the same time, for each turn."""
    turn_size = rows if pooled else rows * copies
    turns = []
    for start in range(0, number, turn_size):
        stop = min(start + turn_size, number)
        if pooled:
            cuts = [start + (stop - start) * copy // copies for copy in range(copies + 1)]
        else:
            cuts = [min(start + rows * copy, stop) for copy in range(copies + 1)]
        turns.append([range(a, b) for a, b in pairwise(cuts)])
    return turns


def _losses(
    model: MegatronModel, windows: Windows, routing: RoutingMode, indices: range, first: int
) -> dict[int, float]:
    """Return the losses of this replica's windows, on ranks that have them."""
    batch = batch_of([ScoringRequest(windows[i], 1) for i in indices])
    routing.set_batch(batch.padding, first, windows.length)
    log_probs = model.log_probs(batch)
    if log_probs is None:
        return {}
    sizes = [len(windows[i]) - 1 for i in indices]
    parts = log_probs[0].cpu().split(sizes)
    return {i: -float(part.sum(dtype=torch.float64)) for i, part in zip(indices, parts)}


def _perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats per token; infinite beyond the largest float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def summary(
    losses: Losses, base: Losses, routing: RoutingMode, text_bytes: int | None
) -> dict[str, Any]:
    """Return the metrics of one way of routing. Every rank must call it.

    Args:
        losses: Losses with this way of routing.
        base: Losses that the gap is measured from.
        routing: The way of routing.
        text_bytes: UTF-8 bytes of the predicted text; None if unknown.
    """
    layers = routing.metrics()
    nats = float(losses.sums.sum())
    gap, gap_error = losses.minus(base)
    result: dict[str, Any] = {
        "routing": routing.name,
        "loss": losses.mean,
        "standard_error": losses.standard_error,
        "perplexity": _perplexity(losses.mean),
        "gap": gap,
        "gap_standard_error": gap_error,
        "nats_per_byte": nats / text_bytes if text_bytes else None,
        "bits_per_byte": nats / text_bytes / math.log(2) if text_bytes else None,
        "fan_out": None,
        "max_load": None,
        "layers": layers,
    }
    if layers:
        result["fan_out"] = sum(f["fan_out"] for f in layers.values()) / len(layers)
        result["max_load"] = max(f["load_max_over_mean"] for f in layers.values())
    return result
