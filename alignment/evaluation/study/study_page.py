"""Report of a study as one HTML page that needs no other file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from alignment.evaluation.study.narrative import opening, sentences, status
from alignment.evaluation.study.outcome_pictures import agreement_of
from alignment.evaluation.study.rollout_browser import browser_data
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
from alignment.evaluation.study.study_pictures import page_panels
from alignment.evaluation.study.study_runs import PolicyStudy, StudyRun, settings_of
from megatron_ext.reports.html import render, script_hash, script_json

_TEMPLATE = Path(__file__).with_name("templates") / "study_page.html"
_SCRIPT = Path(__file__).with_name("rollout_browser.js")


def page(study: PolicyStudy) -> str:
    """Return the page of a study, which needs no other file."""
    rollouts = browser_data(study)
    script = _SCRIPT.read_text(encoding="utf-8")
    return render(
        _TEMPLATE,
        title=study.name,
        opening=opening(study),
        sentences=sentences(study),
        panels=page_panels(study),
        grades=_grades(study),
        agreement=_agreement(study),
        hacking=_without_empty_columns([_HACKING, *_hacking(study)]),
        monitors=_monitors(study),
        samples=shown_samples(study),
        rollouts=rollouts,
        rollout_data=script_json(
            {"rows": rollouts.rows, "prompts": rollouts.prompts, "runs": rollouts.runs}
        ),
        script=Markup(script),
        script_hash=Markup(script_hash(script)),
        runs=_runs(study),
        settings_header=["setting", *(study.label(group) for group in study.groups)],
        settings=_different_settings(study),
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
        value = "not recorded" if alpha.value is None else f"{alpha.value:.3f}"
        rows.append([study.label(group), value, gain.text("{:+.2f}"), str(gain.n)])
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


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a table, whose first row is the header, without columns that no row fills."""
    columns = [{row[place] for row in rows[1:]} for place in range(len(rows[0]))]
    filled = [place for place, cells in enumerate(columns) if not place or cells != {"–"}]
    return [[row[place] for place in filled] for row in rows]


def _monitors(study: PolicyStudy) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Return the tables of flagged shares, from first to last.

    Returns:
        For each table its title, header and rows, with the detectors that fire most at the end
        first, and the detectors that never fire.
    """
    titles = {
        HELD_OUT: "Share of flagged responses to held-out prompts, first grading → last grading",
        TRAINING: "Share of flagged responses in training, first tenth of the steps → last tenth",
    }
    parts = []
    for prefix, title in titles.items():
        rows: list[tuple[float, list[str]]] = []
        silent = []
        for name in detectors(study.groups, prefix):
            ends = [shares(group, prefix, name) for group in study.groups]
            if not any(_fires(run, prefix + name) for run in study.runs):
                silent.append(name)
                continue
            highest = max(last.value or 0.0 for _, last in ends)
            rows.append((highest, [name, *(f"{_share(a)} → {_share(b)}" for a, b in ends)]))
        rows.sort(key=lambda row: -row[0])
        if rows or silent:
            header = ["detector", *(study.label(group) for group in study.groups)]
            parts.append((title, header, [row for _, row in rows], silent))
    return parts


def _fires(run: StudyRun, name: str) -> bool:
    return any(run.trained(name).values()) or any(run.graded(name).values())


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


def _different_settings(study: PolicyStudy) -> list[list[str]]:
    """Return the settings in which runs that were named one by one differ, a cell per group."""
    if not study.named_by_folder:
        return []
    settings = [settings_of(group.runs[0].about) for group in study.groups]
    names = sorted({name for each in settings for name in each} - {"seed"})
    rows = []
    for name in names:
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            cells = ["" if value is None else _words(value) for value in values]
            rows.append([name.replace("_", " "), *cells])
    return rows


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(inner)}" for name, inner in value.items())
    return " ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _flat(run: StudyRun) -> list[list[str]]:
    rows: list[list[str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name} {key}".strip(), inner)
        elif value is not None:
            rows.append([name.replace("_", " "), _words(value)])

    add("", run.about)
    return rows
