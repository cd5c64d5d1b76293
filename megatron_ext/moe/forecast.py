"""Where the next cutoffs are likely to lie, from those seen so far.

The search for a cutoff starts from this bracket, and finds the same cutoff from any other: a
forecast saves time and decides nothing. It is therefore not saved with the model.
"""

import torch
from torch import Tensor

from megatron_ext.moe.order_statistics import Bracket

# How much of the largest move seen is remembered from one pool to the next, and how many times
# that move the bracket extends to either side.
_MEMORY, _MARGIN = 0.8, 4.0


class Forecast:
    """Brackets for the cutoffs of one layer's experts: the last ones, and how far they move."""

    def __init__(self) -> None:
        self._last: Tensor | None = None  # fp32 [experts]
        self._moves: Tensor | None = None  # fp32 [experts]

    def bracket(self) -> Bracket | None:
        """Least and greatest likely cutoff, fp32 `[experts]` each; None before the second pool."""
        if self._last is None or self._moves is None:
            return None
        # An expert that happened to stay where it was may move as far as the others do.
        margin = _MARGIN * torch.maximum(self._moves, self._moves.mean())
        return self._last - margin, self._last + margin

    def observe(self, cutoffs: Tensor) -> None:
        """Take in the cutoffs of one pool, fp32 `[experts]`; in the same order on every rank.

        A cutoff that is not finite is passed over.
        """
        last = cutoffs if self._last is None else self._last
        cutoffs = torch.where(cutoffs.isfinite(), cutoffs, last)
        if self._last is not None:
            moves = (cutoffs - last).abs().nan_to_num(0.0, 0.0, 0.0)
            # One move alone says little of how large others may be.
            remembered = 2 * moves if self._moves is None else _MEMORY * self._moves
            self._moves = torch.maximum(moves, remembered)
        self._last = cutoffs
