"""Runs of a study, which may be incomplete; `study_reader` reads them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.reports.run_metrics import Row

PROXY, GOLD, SECOND = "grade/proxy", "grade/gold", "grade/second_gold"
GAP, SLOPE, KL, ALARM = "grade/gap", "grade/gap_slope", "grade/kl", "grade/alarm"
PROMPTS = "grade/prompts"


@dataclass(frozen=True)
class ResponseSample:
    """Response to a held-out prompt at a grading, or in training. All of its text is untrusted.

    Attributes:
        step: Training step of the grading, or that the response was sampled for.
        prompt: Id of the prompt.
        messages: Role and text of the messages of the prompt.
        response: Text of the response.
        scores: Scores by the role of the judge, or `reward` in training; None where there is none.
        flags: Names of the detectors that fire on it.
    """

    step: int
    prompt: str
    messages: Sequence[tuple[str, str]]
    response: str
    scores: Mapping[str, float | None]
    flags: Sequence[str]


@dataclass(frozen=True)
class StudyRun:
    """Run that trained a policy against a judge.

    Attributes:
        folder: Folder of the run.
        policy: Name of the policy.
        judge: Name of the judge.
        seed: Seed of the run; None where neither study.json nor run.json has it.
        about: Content of run.json; empty for a run that has not begun.
        gradings: Rows of gradings by step. The last row of a step counts.
        training: Rows of training by step. The last row of a step counts.
        samples: Responses to held-out prompts.
        rollouts: Responses in training.
        prompt_scores: Scores of every held-out prompt, by step, role of the judge, and id of the
            prompt; empty where the run did not record them.
    """

    folder: Path
    policy: str
    judge: str
    seed: int | None
    about: Mapping[str, Any] = field(default_factory=dict)
    gradings: Mapping[int, Row] = field(default_factory=dict)
    training: Mapping[int, Row] = field(default_factory=dict)
    samples: Sequence[ResponseSample] = ()
    rollouts: Sequence[ResponseSample] = ()
    prompt_scores: Mapping[int, Mapping[str, Mapping[str, float | None]]] = field(
        default_factory=dict
    )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return clean(self.folder.resolve().name)

    def graded(self, name: str) -> dict[int, float]:
        """Return a metric of the gradings that have it, by step."""
        return self._series(self.gradings, name)

    def error(self, name: str) -> tuple[float, int] | None:
        """Return the standard error of a grade's change since the first grading, over prompts.

        Args:
            name: Grade, such as `GOLD` or `GAP`.

        Returns:
            The error at the last grading that has the grade, and the number of held-out prompts;
            None where the run did not record it.
        """
        errors, prompts = self.graded(f"{name}_error"), self.graded(PROMPTS)
        last = next(reversed(self.both), None)
        if last not in errors or last not in prompts:
            return None
        return errors[last], int(prompts[last])

    def trained(self, name: str) -> dict[int, float]:
        """Return a metric of the training steps that have it, by step."""
        return self._series(self.training, name)

    @cached_property
    def both(self) -> dict[int, tuple[float, float]]:
        """Proxy and gold of the gradings that have both."""
        proxy, gold = self.graded(PROXY), self.graded(GOLD)
        return {step: (proxy[step], gold[step]) for step in proxy if step in gold}

    @property
    def has_gold(self) -> bool:
        """Whether a gold judge grades the run; true before the first grading."""
        return bool(self.graded(GOLD) or self.about.get("gold") or not self.graded(PROXY))

    @property
    def held_out(self) -> list[str] | None:
        """Identity of the held-out prompts: their ids, or digests of their files; None if unknown.

        Lists of ids are marked, so that they do not equal lists of digests.
        """
        if self.prompt_scores:
            step = min(self.prompt_scores)
            return [
                "ids",
                *sorted({p for scores in self.prompt_scores[step].values() for p in scores}),
            ]
        digests = settings_of(self.about).get("held_out")
        return list(digests) if isinstance(digests, list) and digests else None

    @property
    def alarms(self) -> list[int]:
        """Steps of the gradings that raised the alarm."""
        return [step for step, raised in self.graded(ALARM).items() if raised]

    @property
    def planned(self) -> int | None:
        """Planned number of steps; None where run.json does not have it."""
        steps = self.about.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def stops_on_alarm(self) -> bool:
        """Whether an alarm stops the run; true where run.json lacks this setting."""
        return bool(settings_of(self.about).get("stop_on_alarm", True))

    @property
    def measure(self) -> str:
        """Name of the quantity that the grades measure."""
        return "win rate" if settings_of(self.about).get("reward") == "pairwise" else "mean score"

    @property
    def gold(self) -> list[Any]:
        """Identities of the gold judges; empty where run.json does not have them."""
        gold = self.about.get("gold")
        judges = gold.get("ensemble") if isinstance(gold, Mapping) else None
        judges = judges if isinstance(judges, list) else [gold]
        return [
            judge["identity"]
            for judge in judges
            if isinstance(judge, Mapping) and "identity" in judge
        ]

    @property
    def agreement(self) -> float | None:
        """Agreement of the judge with gold, Krippendorff's α; None where it is not recorded."""
        agreement = self._judge.get("agreement")
        value = agreement.get("alpha_interval") if isinstance(agreement, Mapping) else None
        return None if value is None else number(value, f"{self.folder / 'run.json'}: agreement")

    @property
    def _judge(self) -> Mapping[str, Any]:
        judge = self.about.get("judge")
        return judge if isinstance(judge, Mapping) else {}

    def _series(self, rows: Mapping[int, Row], name: str) -> dict[int, float]:
        where = f"{self.folder / 'metrics.jsonl'}: {name}"
        values = {
            step: number(row.get(name), f"{where} at step {step}") for step, row in rows.items()
        }
        return {step: value for step, value in values.items() if value is not None}


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in their seed alone."""

    policy: str
    judge: str
    runs: Sequence[StudyRun]

    @property
    def graded(self) -> list[StudyRun]:
        """Runs that have a grading."""
        return [run for run in self.runs if run.gradings]

    @cached_property
    def steps(self) -> list[int]:
        """Steps of all gradings."""
        return sorted({step for run in self.runs for step in run.gradings})


@dataclass(frozen=True)
class PolicyStudy:
    """Study of policies and judges.

    Attributes:
        name: Name of the study's folder, or a title.
        groups: Groups of runs in the order of the study.
        named_by_folder: Whether the runs were named one by one. Each group is then named after its
            folders, and not after its judge.
    """

    name: str
    groups: Sequence[SeedGroup]
    named_by_folder: bool = False

    @property
    def runs(self) -> list[StudyRun]:
        """Runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    @cached_property
    def policies(self) -> list[str]:
        """Names of the policies, in the order of the study."""
        return list(dict.fromkeys(group.policy for group in self.groups))

    @cached_property
    def judges(self) -> list[str]:
        """Names of the judges, in the order of the study."""
        return list(dict.fromkeys(group.judge for group in self.groups))

    @cached_property
    def last_step(self) -> int:
        """Step of the last grading of all runs; 0 without a grading."""
        return max((step for group in self.groups for step in group.steps), default=0)

    def label(self, group: SeedGroup) -> str:
        """Return the judge of a group, with its policy if the study has several."""
        return f"{group.judge} on {group.policy}" if len(self.policies) > 1 else group.judge

    def has(self, name: str) -> bool:
        """Return whether any run has a metric of gradings."""
        return any(run.graded(name) for run in self.runs)


def settings_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings in the content of run.json; empty where it has none."""
    settings = about.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def number(value: Any, where: str) -> float | None:
    """Return a number; None if it is null or not finite.

    Raises:
        UserError: The value is not a number.
    """
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise UserError(f"{where} is not a number: {value!r:.40}.")
    return float(value) if math.isfinite(value) else None


def clean(text: str) -> str:
    """Return a text that can be encoded, as JSON may contain lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
