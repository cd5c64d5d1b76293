"""Runs to compare by training tokens, grouped if they differ in their seed only."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.reports.run_metrics import Floats, RunMetrics, TrainingWork

# Settings that do not distinguish runs: paths, logging and progress. The digest identifies the
# tokenizer.
_NO_DIFFERENCE = re.compile(
    r"trained_tokens|batch_history|last_batch_size|rank|local_rank|run_dir|load|save|tokenizer_model|iteration|iter_per_epoch|stall_timeout"
    r"|(consumed|wandb|mlflow|one_logger|log|save|exit|tensorboard|timing_log)_.*|data_cache_path"
)


@dataclass(frozen=True)
class ComparedRun:
    """Run in a comparison.

    Attributes:
        name: Short name, unique in the comparison.
        metrics: Metrics of the run.
        settings: Settings from run.json that distinguish runs, without the seed.
        seed: Seed of the run, if recorded.
    """

    name: str
    metrics: RunMetrics
    settings: dict[str, Any]
    seed: int | None

    @cached_property
    def work(self) -> TrainingWork:
        """Tokens, FLOPs and device time of every training row."""
        return self.metrics.work(self.settings)

    def tokens_at(self, steps: Floats) -> Floats:
        """Return the tokens trained on after each of the steps."""
        return np.interp(steps, [0.0, *self.work.steps], [0.0, *self.work.tokens])

    @property
    def tokens(self) -> float:
        """Number of tokens trained on."""
        return float(self.work.tokens[-1])

    def curve(self, name: str) -> tuple[Floats, Floats]:
        """Return tokens and values `[n]` of a training metric, averaged over MoE layers."""
        steps, values = self.metrics.series(name)
        if not len(steps):
            steps, by_layer = self.metrics.over_layers(name)
            values = by_layer.mean(axis=0) if by_layer.size else steps
        return self.tokens_at(steps), values

    def validation(self) -> tuple[Floats, Floats]:
        """Tokens and validation losses."""
        losses = self.metrics.evaluations
        steps = np.array(list(losses), float)
        return self.tokens_at(steps), np.array(list(losses.values()), float)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed only; often a single run."""

    name: str
    runs: list[ComparedRun]

    def curve(self, name: str) -> tuple[Floats, Floats, Floats]:
        """Return the mean curve of a metric over the runs.

        Args:
            name: Name of a training metric, or `val_loss`.

        Returns:
            Numbers of tokens at which all runs have the metric, its mean, and its sample standard
            deviation, `[n]` each.
        """
        curves = [run.validation() if name == "val_loss" else run.curve(name) for run in self.runs]
        by_tokens = [dict(zip(tokens.round(), values)) for tokens, values in curves]
        at = sorted(set.intersection(*map(set, by_tokens)))
        values = np.array([[run[tokens] for tokens in at] for run in by_tokens])  # [runs, n]
        return np.array(at), values.mean(axis=0), deviation(values)


def deviation(values: Floats) -> Floats:
    """Return the sample standard deviation over the first axis; 0 for a single value."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def read_runs(paths: Sequence[str]) -> list[ComparedRun]:
    """Read run directories.

    Raises:
        UserError: A directory occurs twice, or lacks a usable metrics.jsonl or run.json.
    """
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders):
        if folders.count(folder) > 1:
            raise UserError(f"{path} occurs twice. Name each run once.")
    parts = [folder.name for folder in folders]
    if len(set(parts)) < len(parts):  # extend names to the shortest unique paths
        above = os.path.commonpath(folders)
        parts = [os.path.relpath(folder, above) for folder in folders]
    return [_read(Path(path), name) for path, name in zip(paths, parts)]


def _read(path: Path, name: str) -> ComparedRun:
    metrics = RunMetrics.read(path)
    try:
        settings = json.loads((path / "run.json").read_text(encoding="utf-8"))["settings"]
        settings = {key: v for key, v in settings.items() if not _NO_DIFFERENCE.fullmatch(key)}
        settings["global_batch_size"], settings["seq_length"]
    except OSError as error:
        raise UserError(
            f"{path / 'run.json'}: {error.strerror}. A comparison requires the settings of "
            "each run."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'run.json'} does not contain the settings of a run: {error}"
        ) from error
    varied = settings.get("rampup_batch_size") or settings.get("step_batch_size_schedule")
    if varied and not len(metrics.series("tokens")[0]):
        raise UserError(
            f"{path / 'metrics.jsonl'} does not record the tokens of each step, and the batch size "
            "changed during the run. Repeat the run to compare it by tokens."
        )
    return ComparedRun(name, metrics, settings, settings.pop("seed", None))


def group_runs(runs: Sequence[ComparedRun]) -> list[RunGroup]:
    """Group runs with equal settings and different seeds, in the order of their first run."""
    groups: list[list[ComparedRun]] = []
    for run in runs:
        for group in groups:
            if group[0].settings == run.settings and run.seed not in [r.seed for r in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    return [RunGroup(_name(group), group) for group in groups]


def _name(runs: list[ComparedRun]) -> str:
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs])  # noqa: RUF071
    common = re.sub(r"[-_. /]*(seed|s)?[-_. /=]*\d*$", "", common) or runs[0].name
    return f"{common} ({len(runs)} seeds)"


def differences(groups: Sequence[RunGroup]) -> dict[str, list[Any]]:
    """Return the settings that differ, with the value of each group, None where it has none."""
    settings = [group.runs[0].settings for group in groups]
    names = sorted({name for group in settings for name in group})
    values = {name: [group.get(name) for group in settings] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}
