"""Storage of the results of CORE tasks, and the table of all tasks."""

import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError
from megatron_ext.evaluation.core.bundle import CoreTask

if TYPE_CHECKING:
    from megatron_ext.evaluation.core.core_scoring import ScoredItem

COLUMNS = (
    "task", "kind", "shots", "items", "cropped", "accuracy", "baseline", "centered",
)  # fmt: skip


class CoreResults:
    """Results in the file `results.jsonl` of a folder: the settings, then one row per task.

    The file is replaced atomically after each task, so that it is valid after a stop at any time.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Read existing results.

        Args:
            folder: Folder of the results, created when the first row is written.
            settings: Everything that the results depend on, except the tasks.

        Raises:
            UserError: The folder has results of other settings, or its file is damaged.
        """
        self.folder, self.settings = folder, settings
        self.file = folder / "results.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        if not self.file.exists():
            return
        try:
            before, *rows = map(json.loads, self.file.read_text().splitlines())
            self.rows = {row["task"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file} is damaged. Remove it or choose another --out."
            ) from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.file} has results with {name} {before.get(name)}, this run has "
                    f"{value}. Choose another --out."
                )

    def finished(self, task: CoreTask) -> bool:
        """Return whether there is a row for the same questions in the same format."""
        row = self.rows.get(task.label)
        return row is not None and row["question_format"] == _question_format(task)

    def add(self, task: CoreTask, judged: "ScoredItem") -> None:
        """Add the row of a finished task and write the file."""
        self.rows[task.label] = {
            "task": task.label,
            "kind": task.kind,
            "shots": task.shots,
            "items": len(judged.answers),
            "prompts": judged.prompts,
            "cropped": judged.cropped,
            "accuracy": judged.right / len(judged.answers),
            "answers": judged.answers,
            "question_format": _question_format(task),
        }
        lines = [json.dumps(entry) for entry in (self.settings, *self.rows.values())]
        _write(self.file, "\n".join(lines) + "\n")

    def table(self, tasks: list[CoreTask], is_complete: bool) -> dict[str, Any]:
        """Return the results of finished tasks and their mean.

        Args:
            tasks: The tasks.
            is_complete: Whether these are all tasks of the bundle, so that the mean is CORE.
        """
        rows = []
        for task in tasks:
            row: dict[str, Any] = {name: self.rows[task.label].get(name) for name in COLUMNS}
            row["baseline"] = task.baseline
            row["centered"] = (row["accuracy"] - task.baseline) / (1 - task.baseline)
            rows.append(row)
        mean = sum(row["centered"] for row in rows) / len(rows)
        return {**self.settings, "tasks": rows, "core" if is_complete else "mean_centered": mean}

    def save(self, table: dict[str, Any]) -> None:
        """Write `core.json`, `core.csv` and `core.md`."""
        _write(self.folder / "core.json", json.dumps(table, indent=1) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table["tasks"])
        _write(self.folder / "core.csv", text.getvalue())
        _write(self.folder / "core.md", markdown(table))


def markdown(table: dict[str, Any]) -> str:
    """Return the table in Markdown, with accuracies as fractions."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for row in table["tasks"]:
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    name, mean = "CORE", table.get("core")
    if mean is None:
        name, mean = "mean of these", table["mean_centered"]
    lines.append(f"| {name} {'| ' * (len(COLUMNS) - 2)}| {mean:.4f} |")
    return "\n".join(lines) + "\n"


def _question_format(task: CoreTask) -> list[Any]:
    return [task.kind, task.shots, task.delimiter, task.digest()]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
