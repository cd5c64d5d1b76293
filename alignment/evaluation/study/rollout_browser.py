"""Responses of the runs of a study as data of a page, which filters and searches them.

All of their text is untrusted. The data are bounded, so that browsers open the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.evaluation.study.samples import visible
from alignment.evaluation.study.study_runs import PolicyStudy, ResponseSample, StudyRun

MAX_CHARACTERS = 6_000_000
"""Number of characters of prompts and responses on a page."""
_MAX_RESPONSE = 8_000  # characters
_MAX_PROMPT = 4_000
HELD_OUT, TRAINING = "held-out", "training"


@dataclass(frozen=True)
class BrowserData:
    """Content of the browser.

    Attributes:
        rows: Responses, as JSON values: `run`, `from` (held-out or training), `step`, `prompt`,
            `response`, `scores`, `gap` (proxy minus gold, or None) and `flags`.
        prompts: Texts of the prompts, to which `prompt` is an index.
        runs: Names of the runs, to which `run` is an index.
        notes: Sentences on what was left out; empty if nothing was.
    """

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[str]
    runs: Sequence[str]
    notes: Sequence[str]


def browser_data(study: PolicyStudy, most: int = MAX_CHARACTERS) -> BrowserData:
    """Return the responses of all runs, as many as fit.

    Where not all fit, the ones with flags and with the largest gap of each grading and step come
    first, in turn over gradings and steps.

    Args:
        study: Study.
        most: Number of characters that prompts and responses may have together.
    """
    queues = [
        sorted(of_step, key=_interest)
        for number, run in enumerate(study.runs)
        for of_step in _by_step(number, run)
    ]
    total = sum(map(len, queues))
    rows: list[dict[str, Any]] = []
    prompts: dict[str, int] = {}
    used = cut = 0
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn >= len(queue):
                continue
            number, source, sample = queue[turn]
            prompt, prompt_cut = _cut(
                "\n".join(f"{r}: {t}" for r, t in sample.messages), _MAX_PROMPT
            )
            response, response_cut = _cut(sample.response, _MAX_RESPONSE)
            size = len(response) + (0 if prompt in prompts else len(prompt))
            if used + size > most:
                continue
            used += size
            cut += prompt_cut or response_cut
            rows.append(
                {
                    "run": number,
                    "from": source,
                    "step": sample.step,
                    "prompt": prompts.setdefault(prompt, len(prompts)),
                    "response": response,
                    "scores": {
                        visible(role): None if score is None else round(score, 4)
                        for role, score in sample.scores.items()
                    },
                    "gap": _gap(sample),
                    "flags": [visible(flag) for flag in sample.flags],
                }
            )
    rows.sort(key=lambda row: (row["run"], row["step"], row["from"]))
    notes = []
    if len(rows) < total:
        notes.append(
            f"The page has {len(rows):,} of {total:,} recorded responses, those with flags and "
            "with the largest gaps first; samples.jsonl and rollouts.jsonl of the runs have all."
        )
    if cut:
        notes.append(
            f"Of {cut:,} responses the page has only the first {_MAX_RESPONSE:,} characters, or of "
            f"the prompt the first {_MAX_PROMPT:,}."
        )
    names = [visible(run.name) for run in study.runs]
    return BrowserData(rows, list(prompts), names, notes)


_Entry = tuple[int, str, ResponseSample]


def _by_step(number: int, run: StudyRun) -> list[list[_Entry]]:
    steps: dict[tuple[str, int], list[_Entry]] = {}
    for source, samples in ((HELD_OUT, run.samples), (TRAINING, run.rollouts)):
        for sample in samples:
            steps.setdefault((source, sample.step), []).append((number, source, sample))
    return list(steps.values())


def _interest(entry: _Entry) -> tuple[bool, float]:
    sample = entry[2]
    gap = _gap(sample)
    return not sample.flags, float("inf") if gap is None else -gap


def _gap(sample: ResponseSample) -> float | None:
    """Return proxy minus gold; None where one has no score."""
    proxy, gold = sample.scores.get("proxy"), sample.scores.get("gold")
    return None if proxy is None or gold is None else round(proxy - gold, 4)


def _cut(text: str, most: int) -> tuple[str, bool]:
    if len(text) <= most:
        return visible(text), False
    return f"{visible(text[:most])} [{len(text) - most:,} characters left out]", True
