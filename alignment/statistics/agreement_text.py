"""Agreement figures as text tables and as plain values for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignment.statistics.agreement_measures import TITLES
from alignment.statistics.bootstrap import Estimate

# Figures of a slice in the table, by whether the verdicts are pairwise; the JSON has all of them.
_MAIN = {False: ("alpha_interval", "quadratic_kappa", "bias"), True: ("accuracy", "alpha_nominal")}


@dataclass(frozen=True)
class AgreementSummary:
    """Agreement figures over some items.

    Attributes:
        items: Number of items.
        both: Number of items that both judges judged, over which agreement is measured.
        agreement: Figures that compare the judges, by name.
        judges: Figures of the first and of the second judge alone, by name.
    """

    items: int
    both: int
    agreement: Mapping[str, Estimate]
    judges: Sequence[Mapping[str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "items": self.items,
            "judged_by_both": self.both,
            "agreement": {name: asdict(e) for name, e in self.agreement.items()},
            "first": {name: asdict(e) for name, e in self.judges[0].items()},
            "second": {name: asdict(e) for name, e in self.judges[1].items()},
        }


def table(
    pairwise: bool, whole: AgreementSummary, slices: Mapping[str, Mapping[str, AgreementSummary]]
) -> str:
    """Format all figures with their intervals, then the main figures by slice.

    Args:
        pairwise: Whether the verdicts are preferences.
        whole: Figures over all items.
        slices: Figures by name of a slicing and by slice.
    """
    lines = [f"{whole.both:,} of {whole.items:,} items are judged by both", ""]
    lines += aligned(
        [["first against second", "", "95 % interval"]]
        + [[TITLES[name], *cells(e)] for name, e in whole.agreement.items()]
    )
    for title, judge in zip(("the first by itself", "the second by itself"), whole.judges):
        rows = [[TITLES[name], *cells(e)] for name, e in judge.items()]
        lines += ["", *aligned([[title, "", ""], *rows])]
    main = _MAIN[pairwise]
    for name, parts in slices.items():
        header = [f"by {name}", "items", *(h for m in main for h in (TITLES[m], ""))]
        rows = [
            [key, f"{part.both:,}", *(cell for m in main for cell in cells(part.agreement[m]))]
            for key, part in parts.items()
        ]
        lines += ["", *aligned([header, *rows])]
    return "\n".join(lines + _notes(whole))


def cells(estimate: Estimate) -> list[str]:
    """Return a figure and its interval as text, or the reason why there is none."""
    if estimate.value is None:
        return ["-", f"undefined: {estimate.reason}"]
    value = f"{estimate.value:.3f}"
    if estimate.low is None or estimate.high is None:
        return [value, estimate.reason]
    return [value, f"{estimate.low:.3f} to {estimate.high:.3f}"]


def _notes(whole: AgreementSummary) -> list[str]:
    """Return a note for each interval that omits resamples."""
    notes = [
        f"{TITLES[name]}: undefined in {e.undefined} resamples, which its interval leaves out"
        for figures in (whole.agreement, *whole.judges)
        for name, e in figures.items()
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
