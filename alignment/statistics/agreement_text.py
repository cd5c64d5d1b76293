"""Agreement measures as text tables and as plain values for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignment.statistics.agreement_measures import TITLES
from alignment.statistics.bootstrap import Estimate
from alignment.statistics.judge_difference import AgreementDifference

# Measures of a slice in the table, by whether the verdicts are pairwise; the JSON has all of them.
_MAIN = {False: ("alpha_interval", "quadratic_kappa", "bias"), True: ("accuracy", "alpha_nominal")}


COMPARED = {
    False: ("alpha_interval", "quadratic_kappa", "spearman", "absolute_error", "exact"),
    True: ("accuracy", "alpha_nominal", "exact"),
}
"""Measures by which two judges are compared, by whether the verdicts are pairwise."""


@dataclass(frozen=True)
class AgreementSummary:
    """Agreement measures over some items.

    Attributes:
        items: Number of items.
        judged_by_both: Number of items that both judges judged, over which agreement is measured.
        agreement: Measures that compare the judges, by name.
        judges: Measures of the first and of the second judge alone, by name.
    """

    items: int
    judged_by_both: int
    agreement: Mapping[str, Estimate]
    judges: Sequence[Mapping[str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain values."""
        return {
            "items": self.items,
            "judged_by_both": self.judged_by_both,
            "agreement": {name: asdict(e) for name, e in self.agreement.items()},
            "first": {name: asdict(e) for name, e in self.judges[0].items()},
            "second": {name: asdict(e) for name, e in self.judges[1].items()},
        }


def table(
    pairwise: bool, overall: AgreementSummary, slices: Mapping[str, Mapping[str, AgreementSummary]]
) -> str:
    """Format all measures with their intervals, then the main measures by slice.

    Args:
        pairwise: Whether the verdicts are preferences.
        overall: Measures over all items.
        slices: Measures by name of a slicing and by slice.
    """
    lines = [f"{overall.judged_by_both:,} of {overall.items:,} items are judged by both", ""]
    lines += aligned(
        [["first against second", "", "95 % interval"]]
        + [[TITLES[name], *cells(e)] for name, e in overall.agreement.items()]
    )
    for title, judge in zip(("the first by itself", "the second by itself"), overall.judges):
        rows = [[TITLES[name], *cells(e)] for name, e in judge.items()]
        lines += ["", *aligned([[title, "", ""], *rows])]
    main = _MAIN[pairwise]
    for name, parts in slices.items():
        header = [f"by {name}", "items", *(h for m in main for h in (TITLES[m], ""))]
        rows = [
            [
                key,
                f"{part.judged_by_both:,}",
                *(cell for m in main for cell in cells(part.agreement[m])),
            ]
            for key, part in parts.items()
        ]
        lines += ["", *aligned([header, *rows])]
    return "\n".join(lines + _notes(overall))


def difference_table(
    differences: Mapping[str, AgreementDifference], names: Sequence[str], items: int
) -> str:
    """Format the differences between two judges' agreements with the first, after a sentence.

    Args:
        differences: Differences by measure, the main one first.
        names: Names of the three judges or of their files.
        items: Number of items that all three judged.
    """
    main, result = next(iter(differences.items()))
    change = result.difference
    if change.value is None or change.low is None or change.high is None:
        verdict = f"The difference is not known: {change.reason or 'it has no interval'}"
    else:
        words = "not clearly more or less than"
        if change.low > 0:
            words = "more than"
        elif change.high < 0:
            words = "less than"
        p = "" if result.p is None else f", p = {result.p:.3f}"
        verdict = (
            f"{names[2]} agrees with {names[0]} {words} {names[1]}: {TITLES[main]} "
            f"{change.value:+.3f} (95 % interval {change.low:+.3f} to {change.high:+.3f}{p})"
        )
    header = [
        f"on {items:,} items that all three judged",
        "second", "", "third", "", "difference", "", "p",
    ]  # fmt: skip
    rows = [
        [
            TITLES[name], *cells(each.first), *cells(each.second), *cells(each.difference),
            "" if each.p is None else f"{each.p:.3f}",
        ]
        for name, each in differences.items()
    ]  # fmt: skip
    return "\n".join([f"{verdict}.", "", *aligned([header, *rows])])


def cells(estimate: Estimate) -> list[str]:
    """Return a measure and its interval as text, or the reason why there is none."""
    if estimate.value is None:
        return ["-", f"undefined: {estimate.reason}"]
    value = f"{estimate.value:.3f}"
    if estimate.low is None or estimate.high is None:
        return [value, estimate.reason]
    return [value, f"{estimate.low:.3f} to {estimate.high:.3f}"]


def _notes(overall: AgreementSummary) -> list[str]:
    """Return a note for each interval that omits resamples."""
    notes = [
        f"{TITLES[name]}: undefined in {e.undefined} resamples, which its interval leaves out"
        for measures in (overall.agreement, *overall.judges)
        for name, e in measures.items()
        if e.low is not None and e.undefined
    ]
    return ["", *notes] if notes else []


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with aligned columns: numbers to the right, other text to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").removeprefix("-").isdigit()
