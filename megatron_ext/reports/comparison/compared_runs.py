"""Runs to compare by training tokens, grouped if they differ in their seed only."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.reports.comparison.text_bytes import BITS, NATS, bytes_per_token
from megatron_ext.reports.run_metrics import (
    Floats,
    RunMetrics,
    TrainingWork,
    refuse_policy_run,
)
from megatron_ext.reports.run_names import seeds_name, unique_names

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
        bytes_per_token: UTF-8 bytes of text per token by which losses are divided, of the training
            and of the validation data; None for losses in nats per token.
    """

    name: str
    metrics: RunMetrics
    settings: dict[str, Any]
    seed: int | None
    bytes_per_token: tuple[float, float] | None = None

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
        if name == "loss":
            values = self.loss_in_unit(values, "train")
        return self.tokens_at(steps), values

    def validation(self) -> tuple[Floats, Floats]:
        """Tokens and validation losses."""
        losses = self.metrics.evaluations
        steps = np.array(list(losses), float)
        values = self.loss_in_unit(np.array(list(losses.values()), float), "valid")
        return self.tokens_at(steps), values

    def loss_in_unit(self, nats: Floats, split: str) -> Floats:
        """Convert losses from nats per token to the unit of the comparison.

        Args:
            nats: Losses in nats per token.
            split: Data that they are on, "train" or "valid".
        """
        if self.bytes_per_token is None:
            return nats
        return nats / math.log(2) / self.bytes_per_token[split == "valid"]


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
        common_tokens = sorted(set.intersection(*map(set, by_tokens)))
        rows = [[run[tokens] for tokens in common_tokens] for run in by_tokens]
        values = np.array(rows)  # [runs, n]
        return np.array(common_tokens), values.mean(axis=0), deviation(values)


def deviation(values: Floats) -> Floats:
    """Return the sample standard deviation over the first axis; 0 for a single value."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def read_runs(paths: Sequence[str]) -> list[ComparedRun]:
    """Read run directories.

    Raises:
        UserError: A directory occurs twice, or lacks a usable metrics.jsonl or run.json.
    """
    return in_one_unit([_read(Path(path), name) for path, name in zip(paths, unique_names(paths))])


def tokenizers_differ(runs: Sequence[ComparedRun]) -> bool:
    """Return whether runs have different tokenizers, as far as their settings show."""
    names = ("tokenizer_sha256", "tokenizer_type", "vocab_size")
    return len({tuple(str(run.settings.get(name)) for name in names) for run in runs}) > 1


def in_one_unit(runs: list[ComparedRun]) -> list[ComparedRun]:
    """Return runs with losses in bits per byte if their tokenizers differ and all bytes are known.

    Otherwise losses are in nats per token.
    """
    if not tokenizers_differ(runs):
        return runs
    ratios = [
        tuple(bytes_per_token(run.settings, split) for split in ("train", "valid")) for run in runs
    ]
    converted = []
    for run, (train, valid) in zip(runs, ratios):
        if train is None or valid is None:
            return runs
        converted.append(replace(run, bytes_per_token=(train, valid)))
    return converted


def loss_unit(runs: Sequence[ComparedRun]) -> str:
    """Return the unit of the losses of compared runs."""
    return NATS if any(run.bytes_per_token is None for run in runs) else BITS


def _read(path: Path, name: str) -> ComparedRun:
    refuse_policy_run(path)
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
    return f"{seeds_name([run.name for run in runs])} ({len(runs)} seeds)"


def differences(groups: Sequence[RunGroup]) -> dict[str, list[Any]]:
    """Return the settings that differ, with the value of each group, None where it has none."""
    settings = [group.runs[0].settings for group in groups]
    names = sorted({name for group in settings for name in group})
    values = {name: [group.get(name) for group in settings] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}
