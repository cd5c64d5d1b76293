"""Reader of the runs of a study, which may be incomplete."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.evaluation.study.study_runs import (
    PolicyStudy,
    ResponseSample,
    SeedGroup,
    StudyRun,
    clean,
    number,
    settings_of,
)
from megatron_ext.errors import UserError
from megatron_ext.json_numbers import load_json
from megatron_ext.reports.run_metrics import Row, read_rows
from megatron_ext.reports.run_names import seeds_name, unique_names


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
    else:
        runs = [_read_run(folder)]
    if not any(run.gradings or is_ungraded(run) for run in runs):
        raise UserError(f"No run of {folder} has a grading yet. Wait for the first one.")
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault((run.policy, run.judge), []).append(run)
    name = clean(folder.resolve().name)
    study = PolicyStudy(name, [SeedGroup(*names, runs) for names, runs in groups.items()])
    for group in study.groups:
        _check_seeds(group)
    return study


def read_compared_runs(folders: Sequence[Path]) -> PolicyStudy:
    """Read runs that are compared with each other.

    Runs with equal settings and different seeds form a group, which is named by the common
    part of the names of its folders; every other run forms a group alone.

    Args:
        folders: Folders of runs.

    Raises:
        UserError: A folder occurs twice or has no graded run, or two runs were graded on different
            prompts, by different gold judges, or one by scores and the other by win rates.
    """
    runs = []
    for folder, name in zip(folders, unique_names(folders)):
        if (folder / "study.json").exists():
            raise UserError(
                f"{folder} is a study of several runs. Report it alone, or name the runs in it."
            )
        run = _read_run(folder)
        if not run.gradings and not is_ungraded(run):
            raise UserError(
                f"The run {folder} has no grading yet. Leave it out, or wait for its first one."
            )
        runs.append((clean(name), run))
    for (_, one), (_, other) in itertools.pairwise(runs):
        if reason := incomparable(one, other):
            raise UserError(
                f"{reason}, so that their scores cannot be compared. Report each of them alone."
            )
    groups: list[list[tuple[str, StudyRun]]] = []
    for name, run in runs:
        for group in groups:
            if _arm(run) == _arm(group[0][1]) and run.seed not in [r.seed for _, r in group]:
                group.append((name, run))
                break
        else:
            groups.append([(name, run)])
    seed_groups = []
    for group in groups:
        names = [name for name, _ in group]
        label = names[0] if len(names) == 1 else seeds_name(names)
        seed_groups.append(SeedGroup("policy", label, [run for _, run in group]))
    title = "Comparison of " + ", ".join(group.judge for group in seed_groups)
    return PolicyStudy(title, seed_groups, named_by_folder=True)


def is_ungraded(run: StudyRun) -> bool:
    """Return whether a run was started without held-out prompts, and has trained."""
    settings = settings_of(run.about)
    return "held_out" in settings and not settings["held_out"] and bool(run.training)


def _arm(run: StudyRun) -> str:
    """Return the identity of a group of runs: their settings and judges without the seed."""
    settings = {name: v for name, v in settings_of(run.about).items() if name != "seed"}
    if not settings or run.seed is None:
        return str(run.folder.resolve())
    return json.dumps([settings, run.about.get("judge"), run.gold], sort_keys=True, default=str)


def incomparable(one: StudyRun, other: StudyRun) -> str:
    """Return why the grades of two runs are incomparable; an empty string otherwise."""
    runs = f"{one.folder} and {other.folder}"
    prompts = one.held_out, other.held_out
    marked = [identity is not None and identity[:1] == ["ids"] for identity in prompts]
    if None not in prompts and marked[0] == marked[1] and prompts[0] != prompts[1]:
        return f"{runs} were graded on different held-out prompts"
    if one.gold and other.gold and one.gold != other.gold:
        return f"{runs} have different gold judges"
    if one.measure != other.measure:
        return f"{one.folder} has the {one.measure} and {other.folder} the {other.measure}"
    return ""


def _check_seeds(group: SeedGroup) -> None:
    """Check that the runs of a group differ in their seed, and in nothing else that is recorded.

    Raises:
        UserError: Two runs have the same seed, different measures or different gold judges.
    """
    arm = f"of {group.judge!r} on {group.policy!r}"
    seeds = [run.seed for run in group.runs if run.seed is not None]
    if duplicates := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(
            f"study.json lists seed {duplicates[0]} {arm} twice. Remove one of these runs."
        )
    advice = "Name another judge or policy for one of them in study.json."
    started = [run for run in group.runs if run.about]
    for one, other in itertools.pairwise(started):
        if one.measure != other.measure:
            raise UserError(
                f"{one.folder} and {other.folder} cannot be seeds {arm}: one has the "
                f"{one.measure}, and the other the {other.measure}. {advice}"
            )
    for one, other in itertools.pairwise(run for run in started if run.gold):
        if one.gold != other.gold:
            raise UserError(
                f"{one.folder} and {other.folder} cannot be seeds {arm}: their gold judges differ. "
                f"{advice}"
            )


def _entries(file: Path) -> list[Mapping[str, Any]]:
    entries = _object(file).get("runs")
    names = ("folder", "policy", "judge")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} must have a list of runs under the key runs.")
    for entry in entries:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(n), str) for n in names):
            raise UserError(
                f"{file}: a run needs the keys folder, policy and judge, not {entry!r:.80}."
            )
    folders: set[Path] = set()
    for entry in entries:
        folder = (file.parent / entry["folder"]).resolve()
        if folder in folders:
            raise UserError(
                f"{file} has the folder {entry['folder']!r} twice. Remove one of the two."
            )
        folders.add(folder)
    return entries


def _of_study(study: Path, entry: Mapping[str, Any]) -> StudyRun:
    folder, seed = study / entry["folder"], entry.get("seed")
    file = folder / "run.json"  # written after the models of the run are loaded
    about = _object(file) if file.exists() else {}
    recorded = about.get("seed")
    if None not in (seed, recorded) and seed != recorded:
        raise UserError(
            f"{study / 'study.json'} has seed {seed} for {folder}, whose run.json has seed "
            f"{recorded}. Correct the seed in study.json."
        )
    seed = recorded if seed is None else seed
    names = (folder, clean(entry["policy"]), clean(entry["judge"]), seed)
    return _with_files(StudyRun(*names, about))


def _read_run(folder: Path) -> StudyRun:
    """Read the run in a folder.

    Raises:
        UserError: The folder has no run of train-policy, or a file is malformed.
    """
    if not (folder / "run.json").exists():
        raise UserError(_no_run(folder))
    about = _object(folder / "run.json")
    judge = about.get("judge")
    # run.json gets its judge after the settings.
    if judge is None and "judge" in settings_of(about):
        raise UserError(f"The run {folder} has no grading yet. Wait for the first one.")
    if not isinstance(judge, Mapping) or not isinstance(judge.get("name"), str):
        other = (
            "python -m tools.report shows runs of pretraining."
            if "num_layers" in settings_of(about)
            else "Name the folder of a run of et-align train-policy."
        )
        raise UserError(f"{folder} is not a run of et-align train-policy. {other}")
    policy = Path(str(about.get("policy") or "policy")).name
    names = (folder, clean(policy), clean(judge["name"]), about.get("seed"))
    return _with_files(StudyRun(*names, about))


def _rows(folder: Path) -> tuple[dict[int, Row], dict[int, Row]]:
    """Return the gradings and the training rows by step; both empty if there is no log yet."""
    file = folder / "metrics.jsonl"
    rows = read_rows(file, "", load_json) if file.exists() else []
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise UserError(f"{file} has a row whose step is not a whole number.")
    gradings = {row["step"]: row for row in rows if any(n.startswith("grade/") for n in row)}
    training = {row["step"]: row for row in rows if "reward" in row or "loss" in row}
    return dict(sorted(gradings.items())), dict(sorted(training.items()))


def _with_files(run: StudyRun) -> StudyRun:
    """Return a run with its metrics, responses and scores."""
    gradings, training = _rows(run.folder)
    samples, rollouts, scores = _texts(run.folder)
    return replace(
        run, gradings=gradings, training=training, samples=samples, rollouts=rollouts,
        prompt_scores=scores,
    )  # fmt: skip


def _texts(
    folder: Path,
) -> tuple[
    list[ResponseSample], list[ResponseSample], dict[int, dict[str, dict[str, float | None]]]
]:
    """Return held-out samples, responses in training, and the scores of every held-out prompt."""
    scores: dict[int, dict[str, dict[str, float | None]]] = {}
    file = folder / "grades.jsonl"
    for row in read_rows(file, "") if file.exists() else []:
        where = f"{file}, step {row.get('step')!r:.20}"
        try:
            scores[int(row["step"])] = {
                clean(role): {
                    clean(str(prompt)): number(score, where)
                    for prompt, score in zip(row["prompts"], values, strict=True)
                }
                for role, values in row["scores"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: not the scores of a grading: {error!r}.") from error
    return _samples(folder / "samples.jsonl"), _samples(folder / "rollouts.jsonl"), scores


def _samples(file: Path) -> list[ResponseSample]:
    """Return the responses in a file. Of several rows of a response and step the last counts."""
    rows = read_rows(file, "") if file.exists() else []
    last = {(row.get("step"), str(row.get("id", row.get("prompt")))): row for row in rows}
    return [_sample(row, file) for row in last.values()]


def _sample(row: Row, file: Path) -> ResponseSample:
    where = f"{file}, step {row.get('step')!r:.20}, prompt {row.get('prompt')!r:.40}"
    try:
        messages = [(clean(m["role"]), clean(m["content"])) for m in row["messages"]]
        scores = {
            clean(name): number(score, f"{where}: {name}") for name, score in row["scores"].items()
        }
        flags = [clean(flag) for flag in row.get("flags") or ()]
        step, prompt, response = row["step"], clean(str(row["prompt"])), clean(row["response"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a sample of a policy run: {error!r}") from error
    if not isinstance(step, int):
        raise UserError(f"{where}: not a sample of a policy run: its step is not a whole number.")
    return ResponseSample(step, prompt, messages, response, scores, flags)


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}. Name the folder of a study or a run."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must contain one JSON object.")
    return value


def _no_run(folder: Path) -> str:
    """Return the message about a folder without study.json and run.json."""
    inside = sorted(file.parent for file in folder.glob("*/run.json")) if folder.is_dir() else []
    if inside:
        names = " ".join(map(str, inside[:4])) + (" ..." if len(inside) > 4 else "")
        return f"{folder} has no study.json and no run.json. Name the runs in it: {names}."
    return f"{folder} has no study.json and no run.json. Name the folder of a study or of a run."
