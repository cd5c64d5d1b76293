"""Bradley-Terry strengths by maximum likelihood: P(policy beats baseline) = σ(strength + style).

Where data separate wins from losses, the likelihood grows without end: a policy that always won has
no finite strength, and a style that only winners have no finite weight. Such comparisons fit
perfectly in the limit and say nothing of all else, so they are set aside, and what the others tell
is what is given; never where an optimizer happened to stop.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import expit

from alignment.rounding import EXACT, Floats
from alignment.statistics.coefficients import Undefined

_STEPS = 100
# Logits beyond are rare where the likelihood has a maximum, and on the way where it has none.
_SUSPICIOUS = 15.0
_ZERO = 1e-9


def strengths(
    policies: NDArray[np.int64], outcomes: Floats, count: int, style: Floats | None = None
) -> Floats:
    """Logits of beating the baseline at equal style, `[count]`, then weights of style, `[k]`.

    Plus or minus infinity is a policy that won, or lost, every comparison. NaN is what the
    comparisons do not tell: a policy has none, style and policy cannot be told apart, or a weight
    grows without end.

    Args:
        policies: whose comparison it is, from 0, `[n]`.
        outcomes: from 0, lost, to 1, won, `[n]`.
        style: of each comparison, `[n, k]`.
    """
    style = np.empty((len(outcomes), 0)) if style is None else style
    # A mean of wins that rounding keeps from 1 would have a finite strength, of any size.
    whole = np.round(outcomes)
    outcomes = np.where(np.abs(outcomes - whole) <= EXACT, whole, outcomes)
    found = np.full(count + style.shape[1], np.nan)
    for policy in range(count):
        own = outcomes[policies == policy]
        if own.size and own.min() == own.max() and own[0] in (0.0, 1.0):
            found[policy] = np.inf if own[0] else -np.inf
    kept = np.intersect1d(np.flatnonzero(np.isnan(found[:count])), policies)
    if kept.size:
        rows = np.isin(policies, kept)
        design = np.hstack([policies[rows, None] == kept, style[rows]]).astype(float)
        fitted = maximum_likelihood(design, outcomes[rows])
        found[kept], found[count:] = fitted[: len(kept)], fitted[len(kept) :]
    return found


def maximum_likelihood(design: Floats, outcomes: Floats) -> Floats:
    """Logistic regression without penalty and intercept, `[columns]`; see `strengths` for NaN.

    Args:
        design: `[n, columns]`.
        outcomes: shares from 0 to 1, `[n]`.
    """
    while len(design):
        basis = _independent(design)
        weights = _newton(design @ basis.T, outcomes)
        if weights is not None:
            told = (basis**2).sum(axis=0) > 1 - _ZERO
            return np.where(told, weights @ basis, np.nan)
        left = ~fitting_perfectly(design, outcomes)
        design, outcomes = design[left], outcomes[left]
    return np.full(design.shape[1], np.nan)


def _independent(design: Floats) -> Floats:
    """Coordinates in which no column depends on others, `[rank, columns]`."""
    sizes = np.linalg.eigvalsh(design.T @ design)
    if sizes[0] > 1e-8 * sizes[-1]:  # no need to look closer, which takes longer
        return np.eye(design.shape[1])
    _, sizes, basis = np.linalg.svd(design, full_matrices=False)
    return basis[sizes > _ZERO * max(sizes[0], _ZERO)]


def _newton(design: Floats, outcomes: Floats) -> Floats | None:
    """The maximum, or None where there is none; columns are independent."""
    weights = np.zeros(design.shape[1])
    checked, reached = False, _log_likelihood(np.zeros(len(design)), outcomes)
    for _ in range(_STEPS):
        logits = design @ weights
        if not checked and np.abs(logits).max(initial=0.0) > _SUSPICIOUS:
            checked = True
            if fitting_perfectly(design, outcomes).any():
                return None
        wins = expit(logits)
        slope = design.T @ (outcomes - wins)
        curvature = (design * (wins * (1 - wins))[:, None]).T @ design
        step = np.linalg.lstsq(curvature, slope)[0]
        least = reached - 1e-12 * len(outcomes)
        while (reached := _log_likelihood(design @ (weights + step), outcomes)) < least:
            step = step / 2
        weights = weights + step
        if np.abs(step).max(initial=0.0) < _ZERO:
            return weights
    raise Undefined(f"no maximum of likelihood was found in {_STEPS} steps")


def fitting_perfectly(design: Floats, outcomes: Floats) -> NDArray[np.bool_]:
    """Comparisons whose likelihood goes to 1 as some weights grow, and no other's falls, `[n]`.

    A linear program: the weights put no win at a negative logit, no loss at a positive one, what is
    neither at 0, and the sum of all as far from 0 as they can.
    """
    sign = np.where(outcomes == 1, 1.0, np.where(outcomes == 0, -1.0, 0.0))
    signed = design * sign[:, None]
    pure, mixed = signed[sign != 0], design[sign == 0]
    if not len(pure):
        return np.zeros(len(design), dtype=bool)
    different, repeats = np.unique(pure, axis=0, return_counts=True)
    fixed = np.unique(mixed, axis=0)
    found = linprog(
        -(different * repeats[:, None]).sum(axis=0),
        A_ub=-different, b_ub=np.zeros(len(different)),
        A_eq=fixed if len(fixed) else None, b_eq=np.zeros(len(fixed)) if len(fixed) else None,
        bounds=(-1, 1),
    )  # fmt: skip
    assert found.status == 0, found.message  # all zeros are allowed, and the box bounds the sum
    return signed @ found.x > 1e-6


def _log_likelihood(logits: Floats, outcomes: Floats) -> float:
    # log σ(x) = -log(1 + exp(-x))
    wins, losses = np.logaddexp(0, -logits), np.logaddexp(0, logits)
    return -float((outcomes * wins + (1 - outcomes) * losses).sum())
