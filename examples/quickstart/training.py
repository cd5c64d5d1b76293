"""Step that trains a model with torchrun, and reports its progress."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from examples.quickstart.corpus import Corpus
from examples.quickstart.steps import Step, duration, module, say
from megatron_ext.json_numbers import load_json

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"

_PROGRESS_S = 15.0


class TrainingProgress:
    """Progress report of a training, read from `metrics.jsonl` as it grows.

    Args:
        last_step: Last step of the training. None to read it from run.json.
        name: Name of the training, if there are several.
        to_follow: Duration of later trainings, in multiples of the duration of this one.
        metric: Metric to report.
    """

    def __init__(
        self,
        metrics: Path,
        last_step: int | None,
        name: str = "",
        to_follow: float = 0,
        metric: str = "loss",
    ) -> None:
        self.metrics, self.last, self.to_follow = metrics, last_step, to_follow
        self.metric = metric
        self.title = f"{name}: " if name else ""
        self.origin: tuple[int, float] | None = None  # first observed step and its time
        self.reported = 0, 0.0  # last reported step and its time

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.reported[1] < _PROGRESS_S or (row := self._last_row()) is None:
            return
        step = int(row["step"])
        if self.origin is None or step <= self.origin[0]:
            self.origin = step, now
            return
        if step == self.reported[0]:
            return
        self.reported = step, now
        seconds = (now - self.origin[1]) / (step - self.origin[0])
        left = (self.last_step - step) * seconds
        all_left = left + self.to_follow * self.last_step * seconds
        say(
            f"      {self.title}step {step:,} of {self.last_step:,}: "
            f"{self.metric} {row[self.metric]:.2f}, "
            + (f"{row['tokens_per_s']:,.0f} tokens/s, " if "tokens_per_s" in row else "")
            + f"{duration(left)} left"
            + (f", {duration(all_left)} for all" if self.to_follow else "")
        )

    @property
    def last_step(self) -> int:
        if self.last is None:
            self.last = int(json.loads((self.metrics.parent / "run.json").read_text())["steps"])
        return self.last

    def _last_row(self) -> dict[str, float] | None:
        """Return the newest training row."""
        if not self.metrics.is_file():
            return None
        with self.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
        for line in reversed(lines):
            try:
                row = load_json(line)
            except ValueError:  # incomplete first line
                return None
            if row.get(self.metric) is not None:
                return row
        return None


def device(on_gpus: bool) -> dict[str, str]:
    """Return the environment variables that select the device of a process."""
    return {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}


def training(
    name: str,
    about: str,
    run: Path,
    corpus: Corpus,
    flags: Sequence[str],
    recipes: Sequence[Path],
    *,
    ranks: int,
    on_gpus: bool,
    progress: TrainingProgress,
) -> Step:
    """Return the step that trains one model.

    Args:
        name, about: As in `Step`.
        run: Folder of the run. Its console is in console.log.
        flags: Flags of pretrain_et.py after those of the dataset and the recipes.
        recipes: Recipes in order.
    """
    # These flags need neither Transformer Engine nor Apex; on the CPU they are the defaults.
    plain = ["--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
    plain += ["--no-persist-layer-norm", "--no-masked-softmax-fusion"]
    network = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    left = ("checkpoints", "tensorboard", "metrics.jsonl", "run.json")
    return Step(
        name,
        f"{about} on {ranks} {'GPU' if on_gpus else 'CPU'} rank{'s' if ranks > 1 else ''}",
        [
            *module("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", str(ranks), str(ROOT / "pretrain_et.py")),
            *(word for recipe in recipes for word in ("--recipe", str(recipe))),
            *("--run-dir", str(run), *corpus.flags, *plain, *flags),
        ],
        run / "console.log",
        makes=[run / "checkpoints", run / "metrics.jsonl"],
        depends=[*corpus.files, *(file for recipe in recipes for file in with_bases(recipe))],
        resumes=[run / part for part in left],
        environment={"OMP_NUM_THREADS": "1", **network, **device(on_gpus)},
        watch=progress,
    )


def with_bases(recipe: Path) -> list[Path]:
    """Return a recipe and its bases."""
    base = yaml.safe_load(recipe.read_text()).get("base")
    return [recipe, *(with_bases(recipe.parent / base) if base else ())]


def find_gpus() -> int:
    """Return the number of CUDA devices."""
    import torch

    return torch.cuda.device_count()


def let_import() -> None:
    """Let the processes of the steps import the project in any working directory."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
