"""What a judge's verdicts say of policies: mean scores, win rates and strengths, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.special import logit

from alignment.evaluation.comparisons import PolicyComparison
from alignment.evaluation.style import covariates
from alignment.records import Verdict
from alignment.rounding import Floats
from alignment.statistics.agreement_measures import alone
from alignment.statistics.bootstrap import LEVEL, Estimate, Indices, estimates
from alignment.statistics.bradley_terry import strengths
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import AlignedVerdicts, align_verdicts, groups_of
from megatron_ext.errors import UserError

Verdicts = Mapping[str, Sequence[Verdict]]  # by item
Figure = Callable[[Indices], float]
Advance = Callable[[], None]


@dataclass(frozen=True)
class VerdictCounts:
    """Of a policy's items.

    Attributes:
        judged: those that count.
        malformed, failed: answers of the judge.
    """

    items: int
    judged: int
    malformed: int
    failed: int


@dataclass(frozen=True)
class PolicyScores:
    """By policy.

    Attributes:
        mean: of its prompts' mean scores.
        gain: mean difference from the baseline on the prompts that have a score of both.
    """

    identities: Sequence[str]
    mean: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    counts: Mapping[str, VerdictCounts]


@dataclass(frozen=True)
class PolicyPreferences:
    """By policy, without the baseline, against which all of it is.

    Attributes:
        strength, controlled: Bradley-Terry, in logits; the second at equal style.
        style: weights of what style was controlled for, by name.
    """

    identities: Sequence[str]
    win_rate: Mapping[str, Estimate]
    strength: Mapping[str, Estimate]
    controlled: Mapping[str, Estimate]
    flips: Mapping[str, Estimate]
    style: Mapping[str, Estimate]
    counts: Mapping[str, VerdictCounts]


def check_items(verdicts: Verdicts, items: Sequence[str], name: str, common: bool) -> None:
    """Raise a UserError where there is no verdict on some items."""
    missing = [item for item in items if item not in verdicts]
    if len(missing) == len(items):
        raise UserError(f"{name} has no verdict on what is compared here: annotate these items")
    if missing and not common:
        raise UserError(
            f"{name} lacks {len(missing)} of {len(items)} items, {missing[0]!r} for one: annotate "
            "them, or give --common to take them as not judged"
        )


def score(
    contest: PolicyComparison,
    verdicts: Verdicts,
    name: str,
    resamples: int,
    seed: int,
    advance: Advance,
) -> PolicyScores:
    """Mean scores; prompts are resampled."""
    found = align_verdicts({r.id: verdicts.get(r.id, []) for r in contest.responses},
                   [r.id for r in contest.responses], name)  # fmt: skip
    policies = np.array([contest.policies.index(r.source) for r in contest.responses])
    places = {prompt: place for place, prompt in enumerate(contest.prompts)}
    prompts = np.array([places[r.prompt.id] for r in contest.responses])
    table = _by_prompt(found.mean, policies, prompts, (len(contest.policies), len(places)))
    figures: dict[tuple[str, str], Figure] = {}
    for row, policy in enumerate(contest.policies):
        figures["mean", policy] = partial(_mean, table[row])
        if row:
            figures["gain", policy] = partial(_mean, table[row] - table[0])
    every = estimates(figures, list(np.arange(len(places))[:, None]), resamples, seed, advance)
    counts = {
        policy: _counts(found, ~np.isnan(found.mean), policies == row)
        for row, policy in enumerate(contest.policies)
    }
    return PolicyScores(found.identities, _named(every, "mean"), _named(every, "gain"), counts)


def _by_prompt(labels: Floats, rows: Indices, columns: Indices, shape: tuple[int, int]) -> Floats:
    """Mean of the labels that are there, NaN where none is, `[policies, prompts]`."""
    there = ~np.isnan(labels)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows[there], columns[there]), labels[there])
    np.add.at(count, (rows[there], columns[there]), 1)
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def _mean(values: Floats, places: Indices) -> float:
    drawn = values[places]
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        raise Undefined("no prompt that was judged")
    return float(drawn.mean())


def prefer(
    contest: PolicyComparison,
    verdicts: Verdicts,
    name: str,
    resamples: int,
    seed: int,
    advance: Advance,
) -> PolicyPreferences:
    """Win rates and strengths; prompts are resampled, with all pairs of each.

    Raises:
        UserError: no pair was judged in both orders.
    """
    found = align_verdicts({p.id: verdicts.get(p.id, []) for p in contest.pairs},
                   [p.id for p in contest.pairs], name)  # fmt: skip
    outcomes = outcomes_of(found)
    if np.isnan(outcomes).all():
        raise UserError(f"{name} judged no pair in both orders: annotate with --orders both")
    others = contest.policies[1:]
    policies = np.array([others.index(p.source) for p in contest.pairs])
    style, columns = covariates(contest.pairs)
    fits = {
        "strength": _Fits(policies, outcomes, len(others), None),
        "controlled": _Fits(policies, outcomes, len(others), style),
    }
    flips = alone(found)["flip_rate"]
    figures: dict[tuple[str, str], Figure] = {}
    for row, policy in enumerate(others):
        own = policies == row
        figures["win_rate", policy] = partial(_mean, np.where(own, outcomes, np.nan))
        figures["flips", policy] = partial(_of, flips, own)
        for kind, fit in fits.items():
            figures[kind, policy] = partial(fit, row)
    for place, column in enumerate(columns):
        figures["style", column] = partial(fits["controlled"], len(others) + place)
    groups = groups_of([p.prompt.id for p in contest.pairs])
    every = estimates(figures, groups, resamples, seed, advance)
    counts = {
        policy: _counts(found, ~np.isnan(outcomes), policies == row)
        for row, policy in enumerate(others)
    }
    prompts = {
        policy: len({p.prompt.id for p, y in zip(contest.pairs, outcomes)
                     if p.source == policy and not np.isnan(y)})
        for policy in others
    }  # fmt: skip
    kinds = {kind: _named(every, kind) for kind in ("win_rate", "flips", "style", *fits)}
    for kind in fits:
        # The limit is one of win rates, which do not know style.
        limits = kind == "strength"
        kinds[kind] = {p: finite(e, prompts[p], limits) for p, e in kinds[kind].items()}
    return PolicyPreferences(
        found.identities, kinds["win_rate"], kinds["strength"], kinds["controlled"],
        kinds["flips"], kinds["style"], counts,
    )  # fmt: skip


def outcomes_of(found: AlignedVerdicts) -> Floats:
    """How far each pair's first response won, from 0 to 1, `[pairs]`; NaN without both orders.

    Each order counts half, a tie in it a quarter: a judge that goes by position gives 0.5.
    """
    there = ~np.isnan(found.labels)
    total = np.where(there, found.labels, 0.0).sum(axis=0)  # [orders, pairs]
    count = there.sum(axis=0)
    orders = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return orders.mean(axis=0)


class _Fits:
    """Strengths of the pairs at some places; all policies of a resample come from one fit."""

    def __init__(
        self, policies: Indices, outcomes: Floats, count: int, style: Floats | None
    ) -> None:
        self._policies, self._outcomes, self._count, self._style = policies, outcomes, count, style
        self._places: Indices | None = None
        self._last: Floats | Undefined = np.empty(0)

    def __call__(self, number: int, places: Indices) -> float:
        if places is not self._places:
            self._places, self._last = places, self._fit(places)
        if isinstance(self._last, Undefined):
            raise self._last
        if np.isnan(self._last[number]):
            own = places[self._policies[places] == number]
            if number < self._count and np.isnan(self._outcomes[own]).all():
                raise Undefined("no comparison that was judged")
            raise Undefined(
                "style does not vary, goes with the policy, or separates wins from losses"
            )
        return float(self._last[number])

    def _fit(self, places: Indices) -> Floats | Undefined:
        places = places[~np.isnan(self._outcomes[places])]
        style = None if self._style is None else self._style[places]
        try:
            return strengths(self._policies[places], self._outcomes[places], self._count, style)
        except Undefined as error:
            return error


def finite(estimate: Estimate, prompts: int, limits: bool) -> Estimate:
    """An estimate in which infinities are words: a limit, or that there is none on a side.

    Args:
        limits: whether a policy that won, or lost, on all of its prompts has the exact binomial
            limit of its win rate, in logits.
    """
    if estimate.value is None:
        return estimate
    if np.isinf(estimate.value):
        won = estimate.value > 0
        why = f"{'won' if won else 'lost'} on all {prompts} prompts"
        if not limits:
            return Estimate(None, reason=f"{why}, so without end")
        end = float(logit(((1 - LEVEL) / 2) ** (1 / prompts)))
        if won:
            return Estimate(None, low=end, reason=f"{why}: above {end:.2f} at 97.5 %")
        return Estimate(None, high=-end, reason=f"{why}: below {-end:.2f} at 97.5 %")
    low, high = (e if e is None or np.isfinite(e) else None for e in (estimate.low, estimate.high))
    endless = [side for side, end, given in (("lower", low, estimate.low),
               ("upper", high, estimate.high)) if end != given]  # fmt: skip
    if not endless:
        return estimate
    why = f"no {' and '.join(endless)} limit: infinite in more than 2.5 % of resamples"
    return replace(estimate, low=low, high=high, reason=why)


def _of(figure: Figure, own: Floats, places: Indices) -> float:
    return figure(places[own[places]])


def _named(every: Mapping[tuple[str, str], Estimate], kind: str) -> dict[str, Estimate]:
    return {name: estimate for (of, name), estimate in every.items() if of == kind}


def _counts(found: AlignedVerdicts, there: Floats, own: Floats) -> VerdictCounts:
    return VerdictCounts(
        int(own.sum()), int(there[own].sum()), int(found.malformed[own].sum()),
        int(found.failed[own].sum()),
    )  # fmt: skip
