"""Responses of a policy before and after training. All their text is untrusted."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from alignment.evaluation.study.study_runs import PolicyStudy, ResponseSample, SeedGroup, StudyRun

_MAX_PROMPTS = 5

ShownSample = dict[str, Any]


def shown_samples(study: PolicyStudy) -> list[tuple[str, list[tuple[Any, ...]], str]]:
    """Return the first and last responses to some held-out prompts, of one run of each group.

    Returns:
        For each group its title, the prompt with the sample at start and end of each shown prompt,
        and a sentence about prompts that are not shown.
    """
    groups = [_group(study.label(group), group) for group in study.groups]
    return [group for group in groups if group]


def _group(label: str, group: SeedGroup) -> tuple[str, list[tuple[Any, ...]], str] | None:
    run, sides = _sides(group)
    if run is None or not sides:
        return None
    seed = "" if run.seed is None else f", seed {run.seed}"
    title = f"{label}{seed}: step {sides[0][0].step:,} and step {sides[0][1].step:,}"
    pairs = [_pair(*pair) for pair in sides[:_MAX_PROMPTS]]
    rest = len(sides) - _MAX_PROMPTS
    more = f"{rest} more prompts are in {run.name}/samples.jsonl." if rest > 0 else ""
    return title, pairs, more


def _sides(
    group: SeedGroup,
) -> tuple[StudyRun | None, Sequence[tuple[ResponseSample, ResponseSample]]]:
    """Return the first run with samples of two gradings, and the first and last per prompt."""
    for run in group.runs:
        steps = sorted({sample.step for sample in run.samples})
        if len(steps) > 1:
            by_step = [
                {s.prompt: s for s in run.samples if s.step == step}
                for step in (steps[0], steps[-1])
            ]
            pairs = [
                (by_step[0][prompt], end)
                for prompt, end in by_step[1].items()
                if prompt in by_step[0]
            ]
            return run, sorted(pairs, key=lambda pair: -_gap(pair[1]))
    return None, []


def _gap(sample: ResponseSample) -> float:
    """Return proxy minus gold, minus infinity where one has no score."""
    proxy, gold = sample.scores.get("proxy"), sample.scores.get("gold")
    return float("-inf") if proxy is None or gold is None else proxy - gold


def _pair(start: ResponseSample, end: ResponseSample) -> tuple[str, ShownSample, ShownSample]:
    prompt = "\n".join(f"{role}: {text}" for role, text in start.messages)
    return visible(prompt), _side(start), _side(end)


def _side(sample: ResponseSample) -> ShownSample:
    scores = " · ".join(
        f"{role.replace('_', ' ')} {'no score' if score is None else f'{score:.2f}'}"
        for role, score in sample.scores.items()
    )
    return {
        "step": sample.step,
        "scores": scores,
        "flags": [visible(flag) for flag in sample.flags],
        "response": visible(sample.response),
    }


def visible(text: str) -> str:
    """Return a text in which characters that are invisible or turn letters around are numbers."""
    return "".join(f"\\u{ord(c):04x}" if _hidden(c) else c for c in text)


def _hidden(character: str) -> bool:
    # The zero-width joiner combines emoji.
    kind = unicodedata.category(character)
    return (kind == "Cf" and character != "\u200d") or (kind == "Cc" and character not in "\n\t")
