"""Tolerances for results of two computations that add the same terms in different orders."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Share of the largest value. An fp32 sum carries an error of some 1e-7 of its largest term. The
# logits of a model of 30 layers differ by 7e-6 between processors with different vector units.
ROUNDING = 5e-5


def rounding(expected: Tensor | Iterable[float], share: float = ROUNDING) -> float:
    """Return the absolute difference from `expected` that rounding in fp32 explains.

    Logits, and what is derived from them, carry an error of the size of the largest logit, so that
    a small one among large ones differs by more than its own size suggests.

    Args:
        expected: Values of one computation; infinities and NaN are ignored. Log-probabilities and
            losses count as at least 1, which is below the size of the logits they come from.
        share: Largest share of the largest value.
    """
    if not isinstance(expected, Tensor):
        expected = torch.tensor(list(expected), dtype=torch.float64)
    finite = expected[expected.isfinite()].abs()
    return share * max(1.0, float(finite.max()) if finite.numel() else 0.0)
