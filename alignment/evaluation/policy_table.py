"""What an evaluation found, as a table to read and as plain values for JSON."""

from dataclasses import asdict
from typing import Any

from alignment.evaluation.win_rates import PolicyPreferences, PolicyScores, VerdictCounts
from alignment.statistics.agreement_text import aligned, cells
from alignment.statistics.bootstrap import Estimate

_INTERVAL = "95 % interval"


def scores_table(judge: str, found: PolicyScores, baseline: str) -> str:
    """A line a policy."""
    header = [f"scores of {judge}", "mean", _INTERVAL, f"over {baseline}", _INTERVAL, "judged"]
    rows = [
        [policy, *_cells(mean), *_cells(found.gain.get(policy)), _judged(found.counts[policy])]
        for policy, mean in found.mean.items()
    ]
    return "\n".join(aligned([header, *rows]))


def preferences_table(judge: str, found: PolicyPreferences, baseline: str) -> str:
    """A line a policy, and what style counted for."""
    header = [
        f"{judge}, against {baseline}", "win rate", _INTERVAL, "strength", _INTERVAL,
        "at equal style", _INTERVAL, "flips", "judged",
    ]  # fmt: skip
    rows = [
        [
            policy, *_cells(rate), *_cells(found.strength[policy]),
            *_cells(found.controlled[policy]), _cells(found.flips[policy])[0],
            _judged(found.counts[policy]),
        ]
        for policy, rate in found.win_rate.items()
    ]  # fmt: skip
    lines = aligned([header, *rows])
    if found.style:
        weights = [[name, *_cells(weight)] for name, weight in found.style.items()]
        lines += ["", *aligned([["weight of more", "", _INTERVAL], *weights])]
    return "\n".join(lines)


def _cells(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["", ""]
    if estimate.value is None and (estimate.low, estimate.high) != (None, None):
        return ["∞" if estimate.high is None else "-∞", estimate.reason]
    if estimate.reason and estimate.value is not None:
        ends = [("from", estimate.low), ("to", estimate.high)]
        known = "".join(f"{word} {end:.3f}; " for word, end in ends if end is not None)
        return [f"{estimate.value:.3f}", known + estimate.reason]
    return cells(estimate)


def _judged(counts: VerdictCounts) -> str:
    each = (("malformed answer", counts.malformed), ("failed call", counts.failed))
    lost = [f"{n:,} {what}{'' if n == 1 else 's'}" for what, n in each if n]
    said = f"{counts.judged:,} of {counts.items:,}"
    return f"{said} ({', '.join(lost)})" if lost else said


def scores_json(found: PolicyScores) -> dict[str, Any]:
    policies = {
        policy: {"mean": asdict(mean)}
        | ({"gain": asdict(found.gain[policy])} if policy in found.gain else {})
        | asdict(found.counts[policy])
        for policy, mean in found.mean.items()
    }
    return {"judge": list(found.identities), "policies": policies}


def preferences_json(found: PolicyPreferences) -> dict[str, Any]:
    kinds = ("win_rate", "strength", "controlled", "flips")
    policies = {
        policy: {kind: asdict(getattr(found, kind)[policy]) for kind in kinds}
        | asdict(found.counts[policy])
        for policy in found.win_rate
    }
    style = {name: asdict(weight) for name, weight in found.style.items()}
    return {"judge": list(found.identities), "policies": policies, "style": style}
