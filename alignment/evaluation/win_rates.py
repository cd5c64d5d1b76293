"""Mean scores, win rates and strengths of policies by a judge's verdicts, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.special import logit

from alignment.evaluation.comparisons import PolicyComparison
from alignment.evaluation.style import covariates
from alignment.records import Verdict
from alignment.rounding import Floats
from alignment.statistics.agreement_measures import judge_measures
from alignment.statistics.bootstrap import LEVEL, Estimate, Indices, estimates
from alignment.statistics.bradley_terry import strengths
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import AlignedVerdicts, align_verdicts, groups_of
from megatron_ext.errors import UserError

Verdicts = Mapping[str, Sequence[Verdict]]  # by item
Metric = Callable[[Indices], float]
Advance = Callable[[], None]


@dataclass(frozen=True)
class VerdictCounts:
    """Numbers of items and verdicts of a policy.

    Attributes:
        items: Number of items.
        judged: Number of items that enter the metrics.
        malformed: Number of unparseable verdicts.
        failed: Number of failed verdicts.
    """

    items: int
    judged: int
    malformed: int
    failed: int


@dataclass(frozen=True)
class PolicyScores:
    """Scores of policies by one judge.

    Attributes:
        identities: Identities of the judge in its verdicts.
        mean: Mean over prompts of the mean score of each, by policy.
        gain: Mean difference from the baseline over the prompts on which both have a score, by
            policy, without the baseline.
        counts: Numbers of items and verdicts by policy.
    """

    identities: Sequence[str]
    mean: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    counts: Mapping[str, VerdictCounts]


@dataclass(frozen=True)
class PolicyPreferences:
    """Preferences of one judge between policies and the baseline, by policy.

    Attributes:
        identities: Identities of the judge in its verdicts.
        win_rate: Win rate against the baseline, from 0 to 1.
        strength: Bradley-Terry strength, in logits.
        controlled: Bradley-Terry strength at equal style, in logits.
        flips: Share of pairs in which the two orders prefer different responses.
        style: Weights of the style covariates, by their name.
        counts: Numbers of items and verdicts by policy.
    """

    identities: Sequence[str]
    win_rate: Mapping[str, Estimate]
    strength: Mapping[str, Estimate]
    controlled: Mapping[str, Estimate]
    flips: Mapping[str, Estimate]
    style: Mapping[str, Estimate]
    counts: Mapping[str, VerdictCounts]


def check_items(verdicts: Verdicts, items: Sequence[str], name: str, common: bool) -> None:
    """Check that a judge has verdicts on the items of a comparison.

    Args:
        verdicts: Verdicts by item.
        items: Ids of the items.
        name: Name of the judge, for error messages.
        common: Whether items may lack a verdict.

    Raises:
        UserError: No item has a verdict, or one lacks it without `common`.
    """
    missing = [item for item in items if item not in verdicts]
    if len(missing) == len(items):
        raise UserError(f"{name} has no verdict on the items of this comparison. Annotate them.")
    if missing and not common:
        raise UserError(
            f"{name} lacks {len(missing)} of {len(items)} items, for example {missing[0]!r}. "
            "Annotate them, or use --common to count them as not judged."
        )


def score(
    comparison: PolicyComparison,
    verdicts: Verdicts,
    name: str,
    resamples: int,
    seed: int,
    advance: Advance,
) -> PolicyScores:
    """Return the mean scores of policies, with intervals over resampled prompts.

    Args:
        comparison: Policies and their responses.
        verdicts: Verdicts by response.
        name: Name of the judge, for error messages.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
        advance: Function that is called before each resample, to report progress.

    Raises:
        UserError: The verdicts are of different kinds.
        TooFewResults: No response has a score.
    """
    ids = [response.id for response in comparison.responses]
    aligned = align_verdicts({item: verdicts.get(item, []) for item in ids}, ids, name)
    policies = np.array([comparison.policies.index(r.source) for r in comparison.responses])
    places = {prompt: place for place, prompt in enumerate(comparison.prompts)}
    prompts = np.array([places[r.prompt.id] for r in comparison.responses])
    table = _by_prompt(aligned.mean, policies, prompts, (len(comparison.policies), len(places)))
    metrics: dict[tuple[str, str], Metric] = {}
    for row, policy in enumerate(comparison.policies):
        metrics["mean", policy] = partial(_mean, table[row])
        if row:
            metrics["gain", policy] = partial(_mean, table[row] - table[0])
    results = estimates(metrics, list(np.arange(len(places))[:, None]), resamples, seed, advance)
    counts = {
        policy: _counts(aligned, ~np.isnan(aligned.mean), policies == row)
        for row, policy in enumerate(comparison.policies)
    }
    return PolicyScores(
        aligned.identities, _named(results, "mean"), _named(results, "gain"), counts
    )


def _by_prompt(labels: Floats, rows: Indices, columns: Indices, shape: tuple[int, int]) -> Floats:
    """Return the mean label of each policy and prompt, `[policies, prompts]`; NaN without one."""
    valid = ~np.isnan(labels)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows[valid], columns[valid]), labels[valid])
    np.add.at(count, (rows[valid], columns[valid]), 1)
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def _mean(values: Floats, places: Indices) -> float:
    sample = values[places]
    sample = sample[~np.isnan(sample)]
    if not sample.size:
        raise Undefined("no prompt was judged")
    return float(sample.mean())


def prefer(
    comparison: PolicyComparison,
    verdicts: Verdicts,
    name: str,
    resamples: int,
    seed: int,
    advance: Advance,
) -> PolicyPreferences:
    """Return win rates and strengths, with intervals over resampled prompts and all their pairs.

    Args:
        comparison: Policies and the pairs of their responses with the baseline's.
        verdicts: Verdicts by pair.
        name: Name of the judge, for error messages.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
        advance: Function that is called before each resample, to report progress.

    Raises:
        UserError: No pair was judged in both orders, or the verdicts are of different kinds.
        TooFewResults: No pair has a verdict that is a preference or a tie.
    """
    ids = [pair.id for pair in comparison.pairs]
    aligned = align_verdicts({item: verdicts.get(item, []) for item in ids}, ids, name)
    outcomes = outcomes_of(aligned)
    if np.isnan(outcomes).all():
        raise UserError(f"{name} judged no pair in both orders. Annotate with --orders both.")
    others = comparison.policies[1:]
    policies = np.array([others.index(p.source) for p in comparison.pairs])
    style, columns = covariates(comparison.pairs)
    fits = {
        "strength": _Fits(policies, outcomes, len(others), None),
        "controlled": _Fits(policies, outcomes, len(others), style),
    }
    flips = judge_measures(aligned)["flip_rate"]
    metrics: dict[tuple[str, str], Metric] = {}
    for row, policy in enumerate(others):
        rows = policies == row
        metrics["win_rate", policy] = partial(_mean, np.where(rows, outcomes, np.nan))
        metrics["flips", policy] = partial(_on_rows, flips, rows)
        for kind, fit in fits.items():
            metrics[kind, policy] = partial(fit, row)
    for place, column in enumerate(columns):
        metrics["style", column] = partial(fits["controlled"], len(others) + place)
    groups = groups_of([p.prompt.id for p in comparison.pairs])
    results = estimates(metrics, groups, resamples, seed, advance)
    counts = {
        policy: _counts(aligned, ~np.isnan(outcomes), policies == row)
        for row, policy in enumerate(others)
    }
    prompts = {
        policy: len({p.prompt.id for p, y in zip(comparison.pairs, outcomes)
                     if p.source == policy and not np.isnan(y)})
        for policy in others
    }  # fmt: skip
    kinds = {kind: _named(results, kind) for kind in ("win_rate", "flips", "style", *fits)}
    for kind in fits:
        # The binomial limit applies to win rates, which ignore style.
        limits = kind == "strength"
        kinds[kind] = {p: finite(e, prompts[p], limits) for p, e in kinds[kind].items()}
    return PolicyPreferences(
        aligned.identities, kinds["win_rate"], kinds["strength"], kinds["controlled"],
        kinds["flips"], kinds["style"], counts,
    )  # fmt: skip


def outcomes_of(verdicts: AlignedVerdicts) -> Floats:
    """Return the outcome of each pair for its first response, `[pairs]`.

    Each order counts half, and a tie in one order a quarter, so that a judge that prefers a
    position gives 0.5.

    Returns:
        The outcomes from 0 (lost) to 1 (won); NaN for a pair that was not judged in both orders.
    """
    valid = ~np.isnan(verdicts.labels)
    total = np.where(valid, verdicts.labels, 0.0).sum(axis=0)  # [orders, pairs]
    count = valid.sum(axis=0)
    orders = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return orders.mean(axis=0)


class _Fits:
    """Strengths fitted to resampled pairs; one fit serves all policies of a resample."""

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
            rows = places[self._policies[places] == number]
            if number < self._count and np.isnan(self._outcomes[rows]).all():
                raise Undefined("no comparison was judged")
            raise Undefined(
                "style does not vary, is the same for all pairs of a policy, or separates wins "
                "from losses"
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
    """Return an estimate whose infinite values are replaced by None and a reason.

    Args:
        estimate: Estimate of a strength, in logits.
        prompts: Number of prompts of the policy.
        limits: Whether a policy that won, or lost, on all of its prompts gets the exact binomial
            limit of its win rate, in logits.
    """
    if estimate.value is None:
        return estimate
    if np.isinf(estimate.value):
        won = estimate.value > 0
        why = f"{'won' if won else 'lost'} on all {prompts} prompts"
        if not limits:
            return Estimate(None, reason=f"{why}, so that the strength is infinite")
        end = float(logit(((1 - LEVEL) / 2) ** (1 / prompts)))
        if won:
            return Estimate(None, low=end, reason=f"{why}: above {end:.2f} at 97.5 %")
        return Estimate(None, high=-end, reason=f"{why}: below {-end:.2f} at 97.5 %")
    low, high = (e if e is None or np.isfinite(e) else None for e in (estimate.low, estimate.high))
    infinite = [side for side, end, original in (("lower", low, estimate.low),
               ("upper", high, estimate.high)) if end != original]  # fmt: skip
    if not infinite:
        return estimate
    why = f"no {' and '.join(infinite)} limit: infinite in more than 2.5 % of resamples"
    return replace(estimate, low=low, high=high, reason=why)


def _on_rows(metric: Metric, rows: Floats, places: Indices) -> float:
    return metric(places[rows[places]])


def _named(results: Mapping[tuple[str, str], Estimate], kind: str) -> dict[str, Estimate]:
    return {name: estimate for (group, name), estimate in results.items() if group == kind}


def _counts(verdicts: AlignedVerdicts, judged: Floats, rows: Floats) -> VerdictCounts:
    """Count the items of a policy.

    Args:
        verdicts: Verdicts on the items of all policies.
        judged: Whether each item enters the metrics, `[items]` bool.
        rows: Whether each item is of the policy, `[items]` bool.
    """
    return VerdictCounts(
        int(rows.sum()), int(judged[rows].sum()), int(verdicts.malformed[rows].sum()),
        int(verdicts.failed[rows].sum()),
    )  # fmt: skip
