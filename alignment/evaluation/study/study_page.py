"""Report of a study as one HTML page that needs no other file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.evaluation.study.narrative import opening, sentences, status
from alignment.evaluation.study.samples import shown_samples
from alignment.evaluation.study.seed_summary import (
    HELD_OUT,
    TRAINING,
    SeedMean,
    detectors,
    kl,
    mean_of,
    shares,
    slope,
    tenths,
    trends_of,
)
from alignment.evaluation.study.study_pictures import agreement_of
from alignment.evaluation.study.study_runs import PolicyStudy, StudyRun
from megatron_ext.reports.html import render

_TEMPLATE = Path(__file__).with_name("templates") / "study_page.html"


def page(study: PolicyStudy, pictures: Mapping[str, Path]) -> str:
    """Return the page of a study.

    Args:
        study: Study to show.
        pictures: PNG files by name; pictures that are absent are omitted.
    """
    return render(
        _TEMPLATE,
        title=study.name,
        opening=opening(study),
        sentences=sentences(study),
        pictures={name: file.read_bytes() for name, file in pictures.items()},
        grades=_grades(study),
        agreement=_agreement(study),
        hacking_header=_HACKING,
        hacking=_hacking(study),
        monitors=_monitors(study),
        samples=shown_samples(study),
        runs=_runs(study),
        origins=[(run.name, _flat(run)) for run in study.runs if run.about],
    )


def _grades(study: PolicyStudy) -> list[list[str]]:
    rows = []
    for group in study.groups:
        for name, trend in trends_of(group).items():
            if trend.change.n:
                cells = (trend.first, trend.last, trend.change)
                means = [m.text("{:+.2f}" if m is trend.change else "{:.2f}") for m in cells]
                rows.append([f"{study.label(group)}: {name}", *means, str(trend.change.n)])
    return rows


def _agreement(study: PolicyStudy) -> list[list[str]]:
    agreements = [(group, agreement_of(group)) for group in study.groups]
    if all(alpha.value is None for _, alpha in agreements):
        return []
    rows = []
    for group, alpha in agreements:
        gain = trends_of(group)["gold"].change
        known = "not recorded" if alpha.value is None else f"{alpha.value:.3f}"
        rows.append([study.label(group), known, gain.text("{:+.2f}"), str(gain.n)])
    return rows


_HACKING = [
    "judge", "runs with alarm", "first alarm", "gap, first", "gap, last",
    "slope, last (per 100 steps)", "KL, last (nats per response)", "unrewarded, end",
]  # fmt: skip


def _hacking(study: PolicyStudy) -> list[list[str]]:
    rows = []
    for group in study.groups:
        alarmed = [run.alarms[0] for run in group.graded if run.alarms]
        gap = trends_of(group)["proxy - gold"]
        unrewarded = mean_of(tenths(run, "unrewarded")[1] for run in group.runs)
        rows.append([
            study.label(group), f"{len(alarmed)} of {len(group.graded)} runs",
            f"step {min(alarmed):,}" if alarmed else "–", gap.first.text(), gap.last.text(),
            slope(group).text(), kl(group).text(), _share(unrewarded),
        ])  # fmt: skip
    return rows


def _monitors(study: PolicyStudy) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of the tables of flagged shares, from first to last."""
    titles = {
        HELD_OUT: "Share of flagged responses to held-out prompts, first grading → last grading",
        TRAINING: "Share of flagged responses in training, first tenth of the steps → last tenth",
    }
    parts = []
    for prefix, title in titles.items():
        rows = []
        for name in detectors(study.groups, prefix):
            ends = [shares(group, prefix, name) for group in study.groups]
            rows.append([name, *(f"{_share(a)} → {_share(b)}" for a, b in ends)])
        if rows:
            header = ["detector", *(study.label(group) for group in study.groups)]
            parts.append((title, header, rows))
    return parts


def _share(mean: SeedMean) -> str:
    return "–" if mean.value is None else f"{mean.value:.1%}"


def _runs(study: PolicyStudy) -> list[list[str]]:
    rows = []
    for run in study.runs:
        last = f"{max(run.gradings):,}" if run.gradings else "–"
        state = status(study, run) or "complete"
        if run.alarms and "alarm" not in state:
            state += f"; alarm at step {run.alarms[0]:,}"
        rows.append([run.name, last, str(len(run.gradings)), state])
    return rows


def _flat(run: StudyRun) -> list[list[str]]:
    rows: list[list[str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name} {key}".strip(), inner)
        elif value is not None:
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append([name.replace("_", " "), words])

    add("", run.about)
    return rows
