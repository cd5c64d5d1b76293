"""Results of an evaluation as text tables and as plain values for JSON."""

from dataclasses import asdict
from typing import Any

from alignment.evaluation.win_rates import PolicyPreferences, PolicyScores, VerdictCounts
from alignment.statistics.agreement_text import aligned, cells
from alignment.statistics.bootstrap import Estimate

_INTERVAL = "95 % interval"


def scores_table(judge: str, scores: PolicyScores, baseline: str) -> str:
    """Format the scores by one judge, one line per policy."""
    header = [f"scores of {judge}", "mean", _INTERVAL, f"over {baseline}", _INTERVAL, "judged"]
    rows = [
        [policy, *_cells(mean), *_cells(scores.gain.get(policy)), _judged(scores.counts[policy])]
        for policy, mean in scores.mean.items()
    ]
    return "\n".join(aligned([header, *rows]))


def preferences_table(judge: str, preferences: PolicyPreferences, baseline: str) -> str:
    """Format the preferences of one judge, one line per policy, and the weights of style."""
    header = [
        f"{judge}, against {baseline}", "win rate", _INTERVAL, "strength", _INTERVAL,
        "at equal style", _INTERVAL, "flips", "judged",
    ]  # fmt: skip
    rows = [
        [
            policy, *_cells(rate), *_cells(preferences.strength[policy]),
            *_cells(preferences.controlled[policy]), _cells(preferences.flips[policy])[0],
            _judged(preferences.counts[policy]),
        ]
        for policy, rate in preferences.win_rate.items()
    ]  # fmt: skip
    lines = aligned([header, *rows])
    if preferences.style:
        weights = [[name, *_cells(weight)] for name, weight in preferences.style.items()]
        lines += ["", *aligned([["weight of more", "", _INTERVAL], *weights])]
    return "\n".join(lines)


def _cells(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["", ""]
    if estimate.value is None and (estimate.low, estimate.high) != (None, None):
        return ["∞" if estimate.high is None else "-∞", estimate.reason]
    if estimate.reason and estimate.value is not None:
        ends = [("from", estimate.low), ("to", estimate.high)]
        intervals = "".join(f"{word} {end:.3f}; " for word, end in ends if end is not None)
        return [f"{estimate.value:.3f}", intervals + estimate.reason]
    return cells(estimate)


def _judged(counts: VerdictCounts) -> str:
    kinds = (("malformed answer", counts.malformed), ("failed call", counts.failed))
    lost = [f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in kinds if n]
    share = f"{counts.judged:,} of {counts.items:,}"
    return f"{share} ({', '.join(lost)})" if lost else share


def scores_json(scores: PolicyScores) -> dict[str, Any]:
    """Return the scores by one judge as plain values."""
    policies = {
        policy: {"mean": asdict(mean)}
        | ({"gain": asdict(scores.gain[policy])} if policy in scores.gain else {})
        | asdict(scores.counts[policy])
        for policy, mean in scores.mean.items()
    }
    return {"judge": list(scores.identities), "policies": policies}


def preferences_json(preferences: PolicyPreferences) -> dict[str, Any]:
    """Return the preferences of one judge as plain values."""
    kinds = ("win_rate", "strength", "controlled", "flips")
    policies = {
        policy: {kind: asdict(getattr(preferences, kind)[policy]) for kind in kinds}
        | asdict(preferences.counts[policy])
        for policy in preferences.win_rate
    }
    style = {name: asdict(weight) for name, weight in preferences.style.items()}
    return {"judge": list(preferences.identities), "policies": policies, "style": style}
