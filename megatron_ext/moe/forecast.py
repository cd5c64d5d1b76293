"""Forecast of the next cutoffs from the previous ones.

The search for a cutoff starts from the bracket of a forecast, and finds the same cutoff from any
other bracket. A forecast only saves time, and is therefore not saved with the model.
"""

import torch
from torch import Tensor

from megatron_ext.moe.order_statistics import Bracket

# Factor by which the largest move so far decays from one pool to the next, and the number of such
# moves by which the bracket extends to either side.
_MEMORY, _MARGIN = 0.8, 4.0


class Forecast:
    """Brackets for the cutoffs of one layer's experts, from the last ones and their moves."""

    def __init__(self) -> None:
        self._last: Tensor | None = None  # fp32 [experts]
        self._moves: Tensor | None = None  # fp32 [experts]

    def bracket(self) -> Bracket | None:
        """Return the least and greatest likely cutoffs, fp32 `[experts]` each, or None at first.

        Two pools must have been observed.
        """
        if self._last is None or self._moves is None:
            return None
        # An expert that happened to stay where it was may move as far as the others do.
        margin = _MARGIN * torch.maximum(self._moves, self._moves.mean())
        return self._last - margin, self._last + margin

    def observe(self, cutoffs: Tensor) -> None:
        """Update the forecast by the cutoffs of one pool, fp32 `[experts]`.

        Every rank must observe the same cutoffs in the same order. Those that are not finite are
        ignored.
        """
        last = cutoffs if self._last is None else self._last
        cutoffs = torch.where(cutoffs.isfinite(), cutoffs, last)
        if self._last is not None:
            moves = (cutoffs - last).abs().nan_to_num(0.0, 0.0, 0.0)
            # From one move, the size of later ones is not yet known.
            remembered = 2 * moves if self._moves is None else _MEMORY * self._moves
            self._moves = torch.maximum(moves, remembered)
        self._last = cutoffs
