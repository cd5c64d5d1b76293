"""The study as one HTML page that needs no other file."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.evaluation.study import samples
from alignment.evaluation.study.narrative import opening, sentences, status
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
from megatron_ext.reports.html import document, picture, table

_STYLE = f"""
img {{ width: auto; max-width: 100%; }}
.wide table {{ white-space: nowrap; }}
.wide th {{ white-space: normal; vertical-align: bottom; }}
.wide td:first-child {{ white-space: normal; min-width: 12rem; }}
{samples.STYLE}"""
_INTERVALS = (
    "In brackets and shaded: 95 % t-intervals of the mean over seeds; of the change of a single "
    "seed, in brackets, over its held-out prompts."
)


def page(study: PolicyStudy, pictures: Mapping[str, Path]) -> str:
    """The page.

    Args:
        pictures: PNG files by name; what is not there is left out.
    """
    parts = [
        f"<h1>{html.escape(study.name)}</h1>",
        f'<p class="summary">{html.escape(opening(study))}</p>',
        f"<ul>{''.join(f'<li>{html.escape(said)}</li>' for said in sentences(study))}</ul>",
        _note(
            "Proxy and gold part where the gap of proxy over gold grows, the 95 % interval of its "
            "change over seeds excluding 0, and gold falls or stays."
        ),
        "<h2>Grades over steps</h2>",
        _picture(pictures, "curves", "grades of held-out prompts over steps, a panel a judge"),
        _note(
            "Thin lines are seeds, bold ones their mean, dashed where some seeds have ended. "
            f"{_INTERVALS} Changes are from a run's first grading to its last."
        ),
        _wide(_grades(study)),
        "<h2>Agreement of judges, and gold's gain</h2>",
        _picture(pictures, "agreement", "gold's gain against the agreement of the judge"),
        _wide(_agreement(study)),
        "<h2>Signs of hacking</h2>",
        _wide(_hacking(study)),
        _note(
            "Gap: proxy - gold; its slope is a 100 steps. KL: from the start policy, nats a "
            "response. Unrewarded: responses without a score in the last tenth of training."
        ),
        *_monitors(study),
        "<h2>Gold against KL</h2>",
        _picture(pictures, "kl", "gold against KL from the start policy"),
        _note(
            "Bold: means over seeds, as far as all of them were graded. Thin: seeds."
            if "kl" in pictures
            else "No run has its KL from the start policy."
        ),
        samples.section(study),
        "<h2>Runs</h2>",
        _wide(_runs(study)),
        _origin(study),
    ]
    return document(study.name, parts, _STYLE)


def _picture(pictures: Mapping[str, Path], name: str, description: str) -> str:
    return picture(pictures[name].read_bytes(), description) if name in pictures else ""


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _wide(content: str) -> str:
    return f'<div class="wide">{content}</div>'


def _grades(study: PolicyStudy) -> str:
    rows = []
    for group in study.groups:
        for name, course in trends_of(group).items():
            if course.change.n:
                cells = (course.first, course.last, course.change)
                means = [m.told("{:+.2f}" if m is course.change else "{:.2f}") for m in cells]
                rows.append([f"{study.label(group)}: {name}", *means, str(course.change.n)])
    return (
        table(["grade", "first", "last", "change", "n"], rows)
        if rows
        else _note("No run has two gradings yet.")
    )


def _agreement(study: PolicyStudy) -> str:
    told = [(group, agreement_of(group)) for group in study.groups]
    if all(alpha.value is None for _, alpha in told):
        return _note("No run tells how far its judge agrees with gold.")
    rows = []
    for group, alpha in told:
        gain = trends_of(group)["gold"].change
        known = "not told" if alpha.value is None else f"{alpha.value:.3f}"
        rows.append([study.label(group), known, gain.told("{:+.2f}"), str(gain.n)])
    return table(["judge", "α with gold", "gold's gain", "n"], rows)


def _hacking(study: PolicyStudy) -> str:
    header = [
        "judge", "alarm", "first", "gap, first", "gap, last", "slope, last", "KL, last",
        "unrewarded, end",
    ]  # fmt: skip
    rows = []
    for group in study.groups:
        alarmed = [run.alarms[0] for run in group.graded if run.alarms]
        gap = trends_of(group)["proxy - gold"]
        unrewarded = mean_of(tenths(run, "unrewarded")[1] for run in group.runs)
        rows.append([
            study.label(group), f"{len(alarmed)} of {len(group.graded)} runs",
            f"step {min(alarmed):,}" if alarmed else "–", gap.first.told(), gap.last.told(),
            slope(group).told(), kl(group).told(), _share(unrewarded),
        ])  # fmt: skip
    return table(header, rows)


def _monitors(study: PolicyStudy) -> list[str]:
    """Shares of responses that each detector flags, from first to last."""
    titles = {
        HELD_OUT: "Flagged responses to held-out prompts, first grading → last",
        TRAINING: "Flagged responses in training, first tenth of the steps → last tenth",
    }
    parts = []
    for prefix, title in titles.items():
        rows = []
        for name in detectors(study.groups, prefix):
            ends = [shares(group, prefix, name) for group in study.groups]
            rows.append([name, *(f"{_share(a)} → {_share(b)}" for a, b in ends)])
        if rows:
            header = ["detector", *(study.label(group) for group in study.groups)]
            parts += [_note(title), _wide(table(header, rows))]
    return parts or [_note("No run logged monitors.")]


def _share(mean: SeedMean) -> str:
    return "–" if mean.value is None else f"{mean.value:.1%}"


def _runs(study: PolicyStudy) -> str:
    rows = []
    for run in study.runs:
        last = f"{max(run.gradings):,}" if run.gradings else "–"
        state = status(study, run) or "whole"
        if run.alarms and "alarm" not in state:
            state += f"; alarm at step {run.alarms[0]:,}"
        rows.append([run.name, last, str(len(run.gradings)), state])
    return table(["run", "last grading", "gradings", "state"], rows)


def _origin(study: PolicyStudy) -> str:
    """What each run was made with, folded away."""
    shown = [
        f"<h3>{html.escape(run.name)}</h3>{table([], _flat(run))}"
        for run in study.runs
        if run.about
    ]
    return f"<details><summary>What the runs were made with</summary>{''.join(shown)}</details>"


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
