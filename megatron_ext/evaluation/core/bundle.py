"""Reader of the files of the CORE benchmark (DCLM, arXiv 2406.11794).

A bundle is a folder with `core.yaml` (the tasks), `eval_data/` (one JSONL file per task) and
`eval_meta_data.csv` (the accuracy by chance of each task, in percent).
"""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError

MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"


@dataclass(frozen=True)
class CoreQuestion:
    """Question of any kind.

    Attributes:
        contexts: Alternative contexts; several for a schema.
        continuations: Alternative continuations; several for multiple choice.
        gold: Index of the right context or continuation; 0 if there is one of each.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def options(self) -> list[tuple[str, str]]:
        """Context and continuation of each option."""
        return [(context, end) for context in self.contexts for end in self.continuations]


@dataclass(frozen=True)
class CoreTask:
    """Task of the bundle.

    Attributes:
        label: Name of the task.
        kind: "multiple_choice", "schema" or "language_modeling".
        shots: Number of solved examples before a question.
        delimiter: Text between context and continuation.
        baseline: Accuracy by chance, in [0, 1).
        data: File of the task.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    data: Path

    def items(self) -> list[CoreQuestion]:
        """Return all questions in the order of the file.

        Raises:
            UserError: A line is malformed, or there is no question.
        """
        with self.data.open(encoding="utf-8") as file:
            items = [self._item(n, line) for n, line in enumerate(file, 1) if line.strip()]
        if not items:
            raise UserError(f"{self.data} contains no question. Unpack the bundle again.")
        return items

    def digest(self) -> str:
        """Return the SHA-256 of the task's file."""
        return hashlib.sha256(self.data.read_bytes()).hexdigest()

    def _item(self, number: int, line: str) -> CoreQuestion:
        try:
            return _READERS[self.kind](json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{self.data}, line {number} is not a {self.kind} question: {reason}. Unpack the "
                "bundle again."
            ) from error


def read_bundle(folder: Path, labels: list[str] | None = None) -> list[CoreTask]:
    """Return the tasks of a bundle, in its order.

    Args:
        folder: The bundle.
        labels: Labels of the tasks. Default: all.

    Raises:
        UserError: The bundle is incomplete or malformed, or has no task of a label.
    """
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} is not a CORE bundle: it has no {name}. Give the folder that contains "
                "it."
            )
    baselines = _baselines(folder / "eval_meta_data.csv")
    file = folder / "core.yaml"
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))["icl_tasks"]
        by_label = {str(entry["label"]): entry for entry in entries}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} has no list icl_tasks of tasks with labels: {error}. Unpack the bundle again."
        ) from error
    if len(by_label) < len(entries):
        raise UserError(f"{file} has two tasks with the same label. Rename one of them.")
    for label in labels or []:
        if label not in by_label:
            raise UserError(
                f"--tasks {label} is not a task of {file}. It has {', '.join(by_label)}."
            )
    selected = [label for label in by_label if labels is None or label in labels]
    return [_task(folder, label, by_label[label], baselines) for label in selected]


def _task(folder: Path, label: str, entry: dict[str, Any], baselines: dict[str, float]) -> CoreTask:
    file = folder / "core.yaml"
    try:
        kind, data = entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
        shots = int(entry["num_fewshot"][0])
        delimiter = str(entry.get("continuation_delimiter", " "))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"Task {label} of {file} has no valid {error}. Unpack the bundle again."
        ) from error
    if kind not in _READERS:
        raise UserError(
            f"Task {label} of {file} has the unknown icl_task_type {kind}. Supported types are "
            f"{', '.join(_READERS)}."
        )
    if not data.is_file():
        raise UserError(f"{data}, the data of task {label}, is missing. Unpack the bundle again.")
    if label not in baselines:
        raise UserError(
            f"{folder / 'eval_meta_data.csv'} has no row for task {label}. Unpack the bundle again."
        )
    return CoreTask(label, kind, shots, delimiter, baselines[label], data)


def _baselines(file: Path) -> dict[str, float]:
    baselines = {}
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            try:
                baseline = float(row["Random baseline"]) / 100
                baselines[row["Eval Task"]] = baseline
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file}, line {rows.line_num} has no Eval Task with its Random baseline: "
                    f"{error}. Unpack the bundle again."
                ) from error
            if not 0 <= baseline < 1:
                raise UserError(
                    f"{file}, line {rows.line_num} has the Random baseline "
                    f"{row['Random baseline']}, which is not a percentage below 100. Correct it."
                )
    return baselines


def _multiple_choice(entry: dict[str, Any]) -> CoreQuestion:
    choices = _texts(entry, "choices")
    return CoreQuestion((_text(entry["query"], "query"),), choices, _gold(entry, choices))


def _schema(entry: dict[str, Any]) -> CoreQuestion:
    contexts = _texts(entry, "context_options")
    return CoreQuestion(
        contexts, (_text(entry["continuation"], "continuation"),), _gold(entry, contexts)
    )


def _language_modeling(entry: dict[str, Any]) -> CoreQuestion:
    # In some files the context ends with a space, which would become part of the next token.
    context, continuation = (_text(entry[name], name) for name in ("context", "continuation"))
    return CoreQuestion((context.strip(),), (continuation,), 0)


_READERS: dict[str, Callable[[dict[str, Any]], CoreQuestion]] = {
    MULTIPLE_CHOICE: _multiple_choice,
    SCHEMA: _schema,
    LANGUAGE_MODELING: _language_modeling,
}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name} is not text")
    return str(value)


def _texts(entry: dict[str, Any], name: str) -> tuple[str, ...]:
    values = entry[name]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} is not a list of texts")
    return tuple(_text(value, name) for value in values)


def _gold(entry: dict[str, Any], options: tuple[str, ...]) -> int:
    gold = entry["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold!r}, which is not one of its {len(options)} options")
    return gold
