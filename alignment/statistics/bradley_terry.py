"""Bradley-Terry strengths by maximum likelihood: P(policy beats baseline) = σ(strength + style).

Where the data separate wins from losses, the likelihood has no maximum: a policy that always won
has no finite strength, and a style that only winners have has no finite weight. Such comparisons
fit perfectly in the limit and say nothing about the other parameters. They are therefore removed,
and the parameters are fitted to the remaining comparisons. The result never depends on where an
optimizer stopped.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import expit

from alignment.rounding import EXACT, Floats
from alignment.statistics.coefficients import Undefined

_STEPS = 100
# Larger logits are rare where the likelihood has a maximum and inevitable where it has none.
_SUSPICIOUS = 15.0
_ZERO = 1e-9


def strengths(
    policies: NDArray[np.int64], outcomes: Floats, count: int, style: Floats | None = None
) -> Floats:
    """Fit the strengths of policies against the baseline and the weights of style.

    Args:
        policies: Index of the policy of each comparison, from 0, `[n]`.
        outcomes: Outcome of each comparison, from 0 (lost) to 1 (won), `[n]`.
        count: Number of policies.
        style: Style covariates of each comparison, `[n, k]`. Default: none.

    Returns:
        The logits of beating the baseline at equal style, `[count]`, followed by the weights of
        style, `[k]`. Plus or minus infinity means that the policy won, or lost, every comparison.
        NaN means that the comparisons do not determine the value: the policy has no comparison,
        style and policy are collinear, or a weight has no finite maximum.
    """
    style = np.empty((len(outcomes), 0)) if style is None else style
    # A mean of wins that differs from 1 only by rounding would have an arbitrary finite strength.
    rounded = np.round(outcomes)
    outcomes = np.where(np.abs(outcomes - rounded) <= EXACT, rounded, outcomes)
    parameters = np.full(count + style.shape[1], np.nan)
    for policy in range(count):
        policy_outcomes = outcomes[policies == policy]
        if (
            policy_outcomes.size
            and policy_outcomes.min() == policy_outcomes.max()
            and policy_outcomes[0] in (0.0, 1.0)
        ):
            parameters[policy] = np.inf if policy_outcomes[0] else -np.inf
    undecided = np.intersect1d(np.flatnonzero(np.isnan(parameters[:count])), policies)
    if undecided.size:
        rows = np.isin(policies, undecided)
        design = np.hstack([policies[rows, None] == undecided, style[rows]]).astype(float)
        fitted = maximum_likelihood(design, outcomes[rows])
        parameters[undecided] = fitted[: len(undecided)]
        parameters[count:] = fitted[len(undecided) :]
    return parameters


def maximum_likelihood(design: Floats, outcomes: Floats) -> Floats:
    """Fit a logistic regression without penalty and intercept.

    Args:
        design: Design matrix, `[n, columns]`.
        outcomes: Shares of wins from 0 to 1, `[n]`.

    Returns:
        The weights, `[columns]`; NaN where the data do not determine a weight, see `strengths`.
    """
    while len(design):
        basis = _independent(design)
        weights = _newton(design @ basis.T, outcomes)
        if weights is not None:
            determined = (basis**2).sum(axis=0) > 1 - _ZERO
            return np.where(determined, weights @ basis, np.nan)
        left = ~fitting_perfectly(design, outcomes)
        design, outcomes = design[left], outcomes[left]
    return np.full(design.shape[1], np.nan)


def _independent(design: Floats) -> Floats:
    """Return a basis of the row space, in which no column depends on others, `[rank, columns]`."""
    sizes = np.linalg.eigvalsh(design.T @ design)
    if sizes[0] > 1e-8 * sizes[-1]:  # full rank, and the decomposition below takes longer
        return np.eye(design.shape[1])
    _, sizes, basis = np.linalg.svd(design, full_matrices=False)
    return basis[sizes > _ZERO * max(sizes[0], _ZERO)]


def _newton(design: Floats, outcomes: Floats) -> Floats | None:
    """Maximize the likelihood by Newton's method; return None where there is no maximum.

    Args:
        design: Design matrix with independent columns, `[n, rank]`.
        outcomes: Shares of wins from 0 to 1, `[n]`.

    Raises:
        Undefined: The method did not converge.
    """
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
    """Return which comparisons fit perfectly in the limit of growing weights, `[n]`.

    These are the comparisons whose likelihood approaches 1 along a direction of the weights in
    which the likelihood of no other comparison falls. A linear program finds the direction: no win
    has a negative logit, no loss a positive one, every other outcome has the logit 0, and the sum
    of the absolute logits is as large as possible.
    """
    sign = np.where(outcomes == 1, 1.0, np.where(outcomes == 0, -1.0, 0.0))
    signed = design * sign[:, None]
    pure, mixed = signed[sign != 0], design[sign == 0]
    if not len(pure):
        return np.zeros(len(design), dtype=bool)
    different, repeats = np.unique(pure, axis=0, return_counts=True)
    fixed = np.unique(mixed, axis=0)
    solution = linprog(
        -(different * repeats[:, None]).sum(axis=0),
        A_ub=-different, b_ub=np.zeros(len(different)),
        A_eq=fixed if len(fixed) else None, b_eq=np.zeros(len(fixed)) if len(fixed) else None,
        bounds=(-1, 1),
    )  # fmt: skip
    # The program is feasible, by zeros, and bounded, by the box.
    assert solution.status == 0, solution.message
    return signed @ solution.x > 1e-6


def _log_likelihood(logits: Floats, outcomes: Floats) -> float:
    # log σ(x) = -log(1 + exp(-x))
    wins, losses = np.logaddexp(0, -logits), np.logaddexp(0, logits)
    return -float((outcomes * wins + (1 - outcomes) * losses).sum())
