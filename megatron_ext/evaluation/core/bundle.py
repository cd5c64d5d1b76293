"""The files of the CORE benchmark (DCLM, arXiv 2406.11794), read and checked.

A bundle is a folder with `core.yaml` (the tasks), `eval_data/` (a JSONL file a task) and
`eval_meta_data.csv` (each task's accuracy by chance, in percent).
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
class Item:
    """A question, whatever its kind.

    Attributes:
        contexts: what may precede; several for a schema.
        continuations: what may follow; several for multiple choice.
        gold: which context or continuation is right; 0 where there is one of each.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def options(self) -> list[tuple[str, str]]:
        """Context and continuation of each answer."""
        return [(context, end) for context in self.contexts for end in self.continuations]


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle.

    Attributes:
        kind: "multiple_choice", "schema" or "language_modeling".
        shots: solved examples before a question.
        delimiter: between context and continuation.
        baseline: accuracy by chance, in [0, 1).
        data: the task's file.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    data: Path

    def items(self) -> list[Item]:
        """All questions in the order of the file.

        Raises:
            UserError: a line is malformed.
        """
        with self.data.open(encoding="utf-8") as file:
            items = [self._item(n, line) for n, line in enumerate(file, 1) if line.strip()]
        if not items:
            raise UserError(f"{self.data} holds no question: unpack the bundle again")
        return items

    def digest(self) -> str:
        """SHA-256 of the task's file."""
        return hashlib.sha256(self.data.read_bytes()).hexdigest()

    def _item(self, number: int, line: str) -> Item:
        try:
            return _READERS[self.kind](json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{self.data}, line {number} is no {self.kind} question: {what}"
            ) from error


def read_bundle(folder: Path, labels: list[str] | None = None) -> list[CoreTask]:
    """The tasks of a bundle, in its order.

    Args:
        labels: of the tasks wanted; None for all.

    Raises:
        UserError: something is missing or not as it should be.
    """
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} is no CORE bundle: it has no {name}; give the folder that holds it"
            )
    baselines = _baselines(folder / "eval_meta_data.csv")
    file = folder / "core.yaml"
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))["icl_tasks"]
        found = {str(entry["label"]): entry for entry in entries}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} has no list icl_tasks of tasks with labels: {error}") from error
    if len(found) < len(entries):
        raise UserError(f"{file} has two tasks of one label")
    for label in labels or []:
        if label not in found:
            raise UserError(f"--tasks {label}: {file} has {', '.join(found)}")
    wanted = [label for label in found if labels is None or label in labels]
    return [_task(folder, label, found[label], baselines) for label in wanted]


def _task(folder: Path, label: str, entry: dict[str, Any], baselines: dict[str, float]) -> CoreTask:
    file = folder / "core.yaml"
    try:
        kind, data = entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
        shots = int(entry["num_fewshot"][0])
        delimiter = str(entry.get("continuation_delimiter", " "))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file}: task {label} lacks a proper {error}") from error
    if kind not in _READERS:
        raise UserError(
            f"{file}: task {label} has the unknown icl_task_type {kind}; known are "
            f"{', '.join(_READERS)}"
        )
    if not data.is_file():
        raise UserError(f"{data}, the data of task {label}, is missing: unpack the bundle again")
    if label not in baselines:
        raise UserError(f"{folder / 'eval_meta_data.csv'} has no row for task {label}")
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
                    f"{file}, line {rows.line_num}: no Eval Task with its Random baseline: {error}"
                ) from error
            if not 0 <= baseline < 1:
                raise UserError(
                    f"{file}, line {rows.line_num}: Random baseline {row['Random baseline']} is "
                    "no percentage below 100"
                )
    return baselines


def _multiple_choice(entry: dict[str, Any]) -> Item:
    choices = _texts(entry, "choices")
    return Item((_text(entry["query"], "query"),), choices, _gold(entry, choices))


def _schema(entry: dict[str, Any]) -> Item:
    contexts = _texts(entry, "context_options")
    return Item(contexts, (_text(entry["continuation"], "continuation"),), _gold(entry, contexts))


def _language_modeling(entry: dict[str, Any]) -> Item:
    # In some files a space ends the context, which would become part of the next token.
    context, continuation = (_text(entry[name], name) for name in ("context", "continuation"))
    return Item((context.strip(),), (continuation,), 0)


_READERS: dict[str, Callable[[dict[str, Any]], Item]] = {
    MULTIPLE_CHOICE: _multiple_choice,
    SCHEMA: _schema,
    LANGUAGE_MODELING: _language_modeling,
}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name} is no text")
    return str(value)


def _texts(entry: dict[str, Any], name: str) -> tuple[str, ...]:
    values = entry[name]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} is no list of texts")
    return tuple(_text(value, name) for value in values)


def _gold(entry: dict[str, Any], options: tuple[str, ...]) -> int:
    gold = entry["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold!r}, which is none of its {len(options)} options")
    return gold
