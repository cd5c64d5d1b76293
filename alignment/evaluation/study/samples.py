"""Responses of a policy before and after training, side by side. All text in them is untrusted."""

import html
import unicodedata
from collections.abc import Sequence

from alignment.evaluation.study.study_runs import PolicyStudy, ResponseSample, SeedGroup, StudyRun

STYLE = """
details { margin: .6rem 0; }
summary { cursor: pointer; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: .5rem 0 1.6rem; }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr; } }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 22rem;
        overflow-y: auto; border-left: 3px solid var(--line); padding: .1rem .8rem; }
.said.prompt { border-color: var(--accent); }
.flag { border: 1px solid var(--line); border-radius: 3px; padding: 0 .35rem; margin-right: .3rem;
        font-size: .85rem; }
"""
_MOST = 5


def section(study: PolicyStudy) -> str:
    """The first and the last response to some held-out prompts, of one run a group."""
    shown = [_group(study.label(group), group) for group in study.groups]
    shown = [part for part in shown if part]
    if not shown:
        return '<h2>Samples</h2><p class="note">No run has samples of two gradings.</p>'
    note = (
        "Of each judge one run, start against end on the same held-out prompts, those first whose "
        "proxy is farthest above gold at the end. Flags are detectors that a response set off."
    )
    unfolded = shown[0].replace("<details>", "<details open>", 1)
    return f'<h2>Samples</h2><p class="note">{note}</p>' + "".join([unfolded, *shown[1:]])


def _group(label: str, group: SeedGroup) -> str:
    run, sides = _sides(group)
    if run is None or not sides:
        return ""
    seed = "" if run.seed is None else f", seed {run.seed}"
    title = f"{label}{seed}: step {sides[0][0].step:,} and step {sides[0][1].step:,}"
    shown = "".join(_pair(*pair) for pair in sides[:_MOST])
    if (rest := len(sides) - _MOST) > 0:
        file = html.escape(f"{run.name}/samples.jsonl")
        shown += f'<p class="note">{rest} more prompts are in {file}.</p>'
    return f"<details><summary>{html.escape(title)}</summary>{shown}</details>"


def _sides(
    group: SeedGroup,
) -> tuple[StudyRun | None, Sequence[tuple[ResponseSample, ResponseSample]]]:
    """The first run with samples of two gradings, and its first and last ones by prompt."""
    for run in group.runs:
        steps = sorted({sample.step for sample in run.samples})
        if len(steps) > 1:
            at = [
                {s.prompt: s for s in run.samples if s.step == step}
                for step in (steps[0], steps[-1])
            ]
            pairs = [(at[0][prompt], end) for prompt, end in at[1].items() if prompt in at[0]]
            return run, sorted(pairs, key=lambda pair: -_gap(pair[1]))
    return None, []


def _gap(sample: ResponseSample) -> float:
    """Of proxy over gold; last where one has no judgement."""
    proxy, gold = sample.scores.get("proxy"), sample.scores.get("gold")
    return float("-inf") if proxy is None or gold is None else proxy - gold


def _pair(start: ResponseSample, end: ResponseSample) -> str:
    prompt = "\n".join(f"{role}: {text}" for role, text in start.messages)
    return (
        f'<div class="said prompt">{_text(prompt)}</div>'
        f'<div class="sides">{_side("start", start)}{_side("end", end)}</div>'
    )


def _side(name: str, sample: ResponseSample) -> str:
    scores = " · ".join(
        f"{role.replace('_', ' ')} {'no judgement' if score is None else f'{score:.2f}'}"
        for role, score in sample.scores.items()
    )
    flags = "".join(f'<span class="flag">{_text(flag)}</span>' for flag in sample.flags)
    return (
        f"<div><b>{name}</b>, step {sample.step:,}: {html.escape(scores)}"
        f"<div>{flags or 'no flags'}</div>"
        f'<div class="said">{_text(sample.response)}</div></div>'
    )


def _text(text: str) -> str:
    """Escaped, with what would be invisible, or turn letters around, as its number."""
    shown = (f"\\u{ord(c):04x}" if _hidden(c) else c for c in text)
    return html.escape("".join(shown))


def _hidden(character: str) -> bool:
    # The joiner of emoji is of use.
    kind = unicodedata.category(character)
    return (kind == "Cf" and character != "\u200d") or (kind == "Cc" and character not in "\n\t")
