"""Sums over the routed tokens of texts, in memory that does not grow with the texts.

Shapes: D domains, L MoE layers, E experts.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.inference.text_routing import TextRouting

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

LOSS_EDGES: Floats = np.array([0, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, np.inf])
"""Edges of the loss buckets in nats; a bucket includes its lower edge."""

LOSS_KINDS = ("next", "own")
"""Loss that a token's fan-out is compared with: of the token predicted here, or its own."""

_MARGIN_BINS = 160


class RoutingSums:
    """Sums over tokens.

    Attributes:
        tokens: Number of tokens, `[D]`.
        load: Number of tokens that each expert took, `[D, L, E]`.
        together: Number of tokens that both of two experts took, `[L, E, E]`.
        fan_out: Number of tokens by fan-out, `[L, E + 1]`.
        margins: Number of pairs of token and expert by margin, `[L, bins + 2]`: below the bins, in
            each bin, and above them.
        margin_limits: Limit of each layer, `[L]`; its bins divide [-limit, limit] evenly. The first
            text determines it, so that its margins reach at least two fifths of the limit.
        by_loss: Number of tokens, sum of their fan-out, and sum of its square, for each of
            `LOSS_KINDS`, layer (the last is the mean of the layers) and loss bucket,
            `[2, L + 1, buckets, 3]`.
    """

    def __init__(self, domains: int, layers: int, experts: int) -> None:
        self.tokens: Counts = np.zeros(domains, np.int64)
        self.load: Counts = np.zeros((domains, layers, experts), np.int64)
        self.together: Counts = np.zeros((layers, experts, experts), np.int64)
        self.fan_out: Counts = np.zeros((layers, experts + 1), np.int64)
        self.margins: Counts = np.zeros((layers, _MARGIN_BINS + 2), np.int64)
        self.margin_limits: Floats | None = None
        buckets = len(LOSS_EDGES) - 1
        self.by_loss: Floats = np.zeros((len(LOSS_KINDS), layers + 1, buckets, 3))

    def add(self, domain: int, routing: "TextRouting") -> None:
        """Add the tokens of a text, or of a window of a text, to a domain."""
        maps = routing.maps
        self.tokens[domain] += maps.shape[1]
        self.load[domain] += maps.sum(dim=1).numpy()
        selection = maps.float()  # [L, tokens, E]: a window's counts are exact in fp32
        self.together += (selection.transpose(1, 2) @ selection).long().numpy()
        fan_out = routing.fan_out.numpy()  # [L, tokens]
        for layer, counts in enumerate(fan_out):
            self.fan_out[layer] += np.bincount(counts, minlength=self.fan_out.shape[1])
        self._add_margins(routing.margins)
        losses = routing.losses.double().numpy()
        self._add_by_loss(0, fan_out[:, :-1], losses[1:])
        self._add_by_loss(1, fan_out[:, 1:], losses[1:])

    def _add_margins(self, margins: "Tensor") -> None:
        values = margins.flatten(1).double().numpy()
        if self.margin_limits is None:
            finite = np.where(np.isfinite(values), np.abs(values), 0.0)
            largest = finite.max(axis=1).clip(2.0**-20)
            self.margin_limits = 2.0 ** np.ceil(np.log2(largest * 1.25))
        for layer, limit in enumerate(self.margin_limits):
            edges = np.linspace(-limit, limit, _MARGIN_BINS + 1)
            bins = np.searchsorted(edges, values[layer], side="right")
            self.margins[layer] += np.bincount(bins, minlength=_MARGIN_BINS + 2)

    def _add_by_loss(self, kind: int, fan_out: Counts, losses: Floats) -> None:
        bucket = np.searchsorted(LOSS_EDGES, losses, side="right") - 1
        bucket = bucket.clip(
            0, len(LOSS_EDGES) - 2
        )  # for a loss of -0.0, or one that is not finite
        for layer, values in enumerate([*fan_out, fan_out.mean(axis=0)]):
            for power in range(3):
                self.by_loss[kind, layer, :, power] += np.bincount(
                    bucket, weights=values.astype(float) ** power, minlength=len(LOSS_EDGES) - 1
                )
