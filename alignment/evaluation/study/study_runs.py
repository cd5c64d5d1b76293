"""Reader of the runs of a study, which may be incomplete."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.reports.run_metrics import Row, read_rows

PROXY, GOLD, SECOND = "grade/proxy", "grade/gold", "grade/second_gold"
GAP, SLOPE, KL, ALARM = "grade/gap", "grade/gap_slope", "grade/kl", "grade/alarm"
PROMPTS = "grade/prompts"


@dataclass(frozen=True)
class ResponseSample:
    """Response to a held-out prompt at a grading. All of its text is untrusted.

    Attributes:
        step: Training step of the grading.
        prompt: Id of the prompt.
        messages: Role and text of the messages of the prompt.
        response: Text of the response.
        scores: Scores by the role of the judge; None where the judge gave none.
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
    """

    folder: Path
    policy: str
    judge: str
    seed: int | None
    about: Mapping[str, Any] = field(default_factory=dict)
    gradings: Mapping[int, Row] = field(default_factory=dict)
    training: Mapping[int, Row] = field(default_factory=dict)
    samples: Sequence[ResponseSample] = ()

    @property
    def name(self) -> str:
        """Name of the folder."""
        return clean(self.folder.resolve().name)

    def graded(self, name: str) -> dict[int, float]:
        """Return a figure of the gradings that have it, by step."""
        return self._figure(self.gradings, name)

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
        """Return a figure of the training steps that have it, by step."""
        return self._figure(self.training, name)

    @cached_property
    def both(self) -> dict[int, tuple[float, float]]:
        """Proxy and gold of the gradings that have both."""
        proxy, gold = self.graded(PROXY), self.graded(GOLD)
        return {step: (proxy[step], gold[step]) for step in proxy if step in gold}

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
        return bool(_settings(self.about).get("stop_on_alarm", True))

    @property
    def measure(self) -> str:
        """Name of the quantity that the grades are."""
        return "win rate" if _settings(self.about).get("reward") == "pairwise" else "mean score"

    @property
    def gold(self) -> list[Any]:
        """Identities of the gold judges; empty where run.json does not have them."""
        gold = self.about.get("gold")
        each = gold.get("ensemble") if isinstance(gold, Mapping) else None
        each = each if isinstance(each, list) else [gold]
        return [one["identity"] for one in each if isinstance(one, Mapping) and "identity" in one]

    @property
    def agreement(self) -> float | None:
        """Agreement of the judge with gold, Krippendorff's α; None where it is not recorded."""
        agreement = self._judge.get("agreement")
        value = agreement.get("alpha_interval") if isinstance(agreement, Mapping) else None
        return None if value is None else _number(value, f"{self.folder / 'run.json'}: agreement")

    @property
    def _judge(self) -> Mapping[str, Any]:
        judge = self.about.get("judge")
        return judge if isinstance(judge, Mapping) else {}

    def _figure(self, rows: Mapping[int, Row], name: str) -> dict[int, float]:
        where = f"{self.folder / 'metrics.jsonl'}: {name}"
        values = {
            step: _number(row.get(name), f"{where} at step {step}") for step, row in rows.items()
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
        name: Name of the study's folder.
        groups: Groups of runs in the order of the study.
    """

    name: str
    groups: Sequence[SeedGroup]

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
        """Step of the last grading of all runs."""
        return max(step for group in self.groups for step in group.steps)

    def label(self, group: SeedGroup) -> str:
        """Return the judge of a group, with its policy if the study has several."""
        return f"{group.judge} on {group.policy}" if len(self.policies) > 1 else group.judge

    def has(self, name: str) -> bool:
        """Return whether any run has a figure of gradings."""
        return any(run.graded(name) for run in self.runs)


def read_study(folder: Path) -> PolicyStudy:
    """Read the study in a folder, or a single run as a study.

    Args:
        folder: Folder with study.json, or folder of a run with run.json.

    Raises:
        UserError: The folder has neither file, a file is malformed, runs of the same policy and
            judge differ in more than their seed, or no run has a grading yet.
    """
    if (folder / "study.json").exists():
        runs = [_of_study(folder, entry) for entry in _entries(folder / "study.json")]
    elif (folder / "run.json").exists():
        runs = [_alone(folder)]
    else:
        raise UserError(f"{folder} has no study.json and no run.json: give a study's or a run's")
    if not any(run.gradings for run in runs):
        raise UserError(f"no run of {folder} has a grading yet: wait for the first")
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault((run.policy, run.judge), []).append(run)
    name = clean(folder.resolve().name)
    study = PolicyStudy(name, [SeedGroup(*names, of) for names, of in groups.items()])
    for group in study.groups:
        _check_seeds(group)
    return study


def _check_seeds(group: SeedGroup) -> None:
    """Check that the runs of a group differ in their seed, and in nothing else that is recorded.

    Raises:
        UserError: Two runs have the same seed, different measures or different gold judges.
    """
    of = f"of {group.judge!r} on {group.policy!r}"
    seeds = [run.seed for run in group.runs if run.seed is not None]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(
            f"study.json has seed {twice[0]} {of} twice, which are no two seeds: take one out"
        )
    advice = "give one another judge or policy in study.json"
    started = [run for run in group.runs if run.about]
    for one, other in itertools.pairwise(started):
        if one.measure != other.measure:
            raise UserError(
                f"{one.folder} and {other.folder} are no two seeds {of}, as one has the "
                f"{one.measure} and the other the {other.measure}: {advice}"
            )
    for one, other in itertools.pairwise(run for run in started if run.gold):
        if one.gold != other.gold:
            raise UserError(
                f"{one.folder} and {other.folder} are no two seeds {of}, as their gold judges "
                f"differ: {advice}"
            )


def _entries(file: Path) -> list[Mapping[str, Any]]:
    entries = _object(file).get("runs")
    names = ("folder", "policy", "judge")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} must have a list of runs")
    for entry in entries:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(n), str) for n in names):
            raise UserError(f"{file}: a run has a folder, a policy and a judge, not {entry!r:.80}")
    folders: set[Path] = set()
    for entry in entries:
        folder = (file.parent / entry["folder"]).resolve()
        if folder in folders:
            raise UserError(f"{file} has the folder {entry['folder']!r} twice: take one out")
        folders.add(folder)
    return entries


def _of_study(study: Path, entry: Mapping[str, Any]) -> StudyRun:
    folder, seed = study / entry["folder"], entry.get("seed")
    file = folder / "run.json"  # written after the models of the run are loaded
    about = _object(file) if file.exists() else {}
    own = about.get("seed")
    if None not in (seed, own) and seed != own:
        raise UserError(
            f"{study / 'study.json'} has seed {seed} for {folder}, whose run.json has seed {own}. "
            "Correct the seed in study.json."
        )
    seed = own if seed is None else seed
    names = (folder, clean(entry["policy"]), clean(entry["judge"]), seed)
    return StudyRun(*names, about, *_rows(folder), _samples(folder))


def _alone(folder: Path) -> StudyRun:
    about = _object(folder / "run.json")
    judge = about.get("judge")
    if judge is None and "judge" in _settings(about):  # run.json gets its judge after the settings
        raise UserError(f"the run {folder} has no grading yet: wait for the first")
    if not isinstance(judge, Mapping) or not isinstance(judge.get("name"), str):
        raise UserError(f"{folder / 'run.json'} does not name its judge: it is of another tool")
    policy = Path(str(about.get("policy") or "policy")).name
    names = (folder, clean(policy), clean(judge["name"]), about.get("seed"))
    return StudyRun(*names, about, *_rows(folder), _samples(folder))


def _settings(about: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = about.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _rows(folder: Path) -> tuple[dict[int, Row], dict[int, Row]]:
    """Return the gradings and the training rows by step; both empty if there is no log yet."""
    file = folder / "metrics.jsonl"
    rows = read_rows(file, "") if file.exists() else []
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise UserError(f"{file} has a row without a whole number as its step")
    gradings = {row["step"]: row for row in rows if any(n.startswith("grade/") for n in row)}
    training = {row["step"]: row for row in rows if "reward" in row or "loss" in row}
    return dict(sorted(gradings.items())), dict(sorted(training.items()))


def _samples(folder: Path) -> list[ResponseSample]:
    file = folder / "samples.jsonl"
    return [_sample(row, file) for row in read_rows(file, "")] if file.exists() else []


def _sample(row: Row, file: Path) -> ResponseSample:
    where = f"{file}, step {row.get('step')!r:.20}, prompt {row.get('prompt')!r:.40}"
    try:
        messages = [(clean(m["role"]), clean(m["content"])) for m in row["messages"]]
        scores = {
            clean(name): _number(score, f"{where}: {name}") for name, score in row["scores"].items()
        }
        flags = [clean(flag) for flag in row.get("flags") or ()]
        step, prompt, response = row["step"], clean(str(row["prompt"])), clean(row["response"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a sample of a policy run: {error!r}") from error
    if not isinstance(step, int):
        raise UserError(f"{where}: not a sample of a policy run: its step is no whole number")
    return ResponseSample(step, prompt, messages, response, scores, flags)


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}: give the folder of a study or a run") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold one JSON object")
    return value


def _number(value: Any, where: str) -> float | None:
    """Return a number; None if it is null or not finite.

    Raises:
        UserError: The value is no number.
    """
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise UserError(f"{where} is no number: {value!r:.40}")
    return float(value) if math.isfinite(value) else None


def clean(text: str) -> str:
    """Return a text that can be encoded, as JSON may contain lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
