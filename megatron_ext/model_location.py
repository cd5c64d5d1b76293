"""Location of models in run directories of either engine, checkpoints and Hugging Face folders.

Megatron is not imported, so that a wrong path is reported at once.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ext.checkpoint import TRACKER, find_checkpoint
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.json_numbers import load_json

_CONFIG = "config.json"
_DEEPSPEED = "latest"
"""DeepSpeed's file next to the folders of its steps; it names the newest one."""

_EXPORTS = ("final", "best")
"""Folders of an alignment run with a model in the Hugging Face format, in order of preference."""


# Files of a model's folder, apart from the weights, that affect its responses.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
_WEIGHTS = (".safetensors", ".distcp", ".bin")
_SAMPLES, _SAMPLE_BYTES = 16, 16384


@dataclass(frozen=True)
class ModelLocation:
    """Model that a path leads to.

    Attributes:
        folder: Hugging Face folder, or folder of a checkpoint's iteration.
        kind: Format of the folder.
        step: Number of steps of its training, if known.
        metrics: Values that the run measured at that step, by name, such as the validation loss.
    """

    folder: Path
    kind: Literal["hf", "megatron"]
    step: int | None = None
    metrics: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        facts = [] if self.step is None else [f"step {self.step:,}"]
        facts += [f"{name} {value:.4f}" for name, value in self.metrics]
        return f"{self.folder} ({', '.join(facts)})" if facts else str(self.folder)


def locate_model(path: str | os.PathLike[str], flag: str = "--load") -> ModelLocation:
    """Return the model that a path leads to.

    Args:
        path: Hugging Face folder; run directory of pretraining, whose newest checkpoint is taken;
            directory of an alignment run, whose `final` is taken, else `best`, else the newest
            checkpoint of Megatron; folder of checkpoints; or folder of one iteration.
        flag: Flag that has the path, for messages.

    Raises:
        UserError: There is no model, it is incomplete, or there are several.
    """
    root = Path(path)
    if not root.is_dir():
        problem = "a file, not a folder" if root.exists() else "not a folder"
        raise UserError(
            f"{flag} {root} is {problem}. Choose a run directory, a checkpoint or a Hugging Face "
            "folder."
        )
    if (root / _CONFIG).is_file() and (root / TRACKER).is_file():
        raise UserError(
            f"{flag} {root} holds two models, a Hugging Face model (config.json) and a checkpoint "
            f"({TRACKER}). Move one of them to another folder."
        )
    if (location := exported_model(root)) is not None:
        return location
    if root.name in _EXPORTS:
        raise UserError(
            f"{flag} {root} has no config.json, so that it is not a complete model. Wait until the "
            "run has written it, or choose the folder of another model."
        )
    _check_readable(root, flag)
    folder = find_checkpoint(root)
    step = int(folder.name[5:]) if folder.name.startswith("iter_") else None
    return ModelLocation(folder, "megatron", step, _losses(folder, step))


def locate_checkpoint(path: str | os.PathLike[str], flag: str = "--load") -> ModelLocation:
    """Return the checkpoint of Megatron that a path leads to; see `locate_model`.

    Raises:
        UserError: There is none, it is incomplete, or the model is a Hugging Face folder.
    """
    location = locate_model(path, flag)
    if location.kind == "hf":
        raise UserError(
            f"{flag} {path} leads to {location.folder}, a Hugging Face folder, where a checkpoint "
            "of Megatron is needed. Convert it with tools.convert_checkpoint --from hf --to "
            "megatron."
        )
    return location


def locate_hf_folder(path: str | os.PathLike[str], flag: str, user: str) -> Path:
    """Return the Hugging Face folder that a path leads to; see `locate_model`.

    Args:
        path: See `locate_model`.
        flag: Flag that has the path, for messages.
        user: Name of the part of the project that requires a Hugging Face folder, for messages.

    Raises:
        UserError: There is none, or the model is a checkpoint of Megatron.
    """
    location = locate_model(path, flag)
    if location.kind == "megatron":
        raise UserError(
            f"{flag} {path} leads to {location.folder}, a checkpoint of Megatron, where {user} "
            "needs a Hugging Face folder. Convert it with tools.convert_checkpoint --from megatron "
            "--to hf."
        )
    return location.folder


def announce_model(path: str | os.PathLike[str], flag: str = "--load") -> Path:
    """Return the folder of the model that a path leads to, and name it on standard error.

    Args:
        path: See `locate_model`.
        flag: Flag that has the path, for messages.

    Raises:
        UserError: There is no model, it is incomplete, or there are several.
    """
    return announced(locate_model(path, flag))


def announced(location: ModelLocation) -> Path:
    """Return the folder of a model, and name the model on standard error."""
    if os.environ.get("RANK", "0") == "0":
        console.warn(f"model: {location}")
    return location.folder


def exported_model(root: Path) -> ModelLocation | None:
    """Return the Hugging Face model in a folder or in the directory of an alignment run, if any."""
    for folder in (root, *(root / name for name in _EXPORTS)):
        if (folder / _CONFIG).is_file():
            return _exported(folder)
    return None


def _exported(folder: Path) -> ModelLocation:
    """Return the location of a Hugging Face folder, with the recorded step and metrics."""
    note = read_json_object(folder / "best.json")
    step = note.get("step")
    metrics = [
        (name, float(value))
        for name, value in note.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return ModelLocation(folder, "hf", step if isinstance(step, int) else None, tuple(metrics))


def _check_readable(root: Path, flag: str) -> None:
    """Refuse a folder without a model, naming the models in its subfolders.

    Raises:
        UserError: The folder has only checkpoints of DeepSpeed, or is the parent of other models.
    """
    for folder in (root, root / "checkpoints", root.parent):
        tracker = folder / _DEEPSPEED
        if not tracker.is_file() or (folder / TRACKER).is_file():
            continue
        if folder == root.parent and not root.name.startswith("step_"):
            continue
        run = folder.parent if folder.name == "checkpoints" else folder
        exports = [run / name for name in _EXPORTS if (run / name / _CONFIG).is_file()]
        advice = f"Give {exports[0]}." if exports else "The run writes a model to best/ or final/."
        raise UserError(
            f"{flag} {root} has checkpoints of DeepSpeed, from which only training can resume. "
            f"{advice}"
        )
    if (root / TRACKER).is_file() or (root / "checkpoints" / TRACKER).is_file():
        return
    if (root / "run.json").is_file() or (root / ".metadata").is_file():
        return
    if models := list(_models_in(root)):
        some = ", ".join(map(str, models[:3])) + (" and others" if len(models) > 3 else "")
        raise UserError(
            f"{flag} {root} has no model, but its subfolders have: {some}. Choose one of them."
        )


def _models_in(root: Path) -> Iterator[Path]:
    """Yield the folders in a folder that have a model."""
    signs = (_CONFIG, TRACKER, f"checkpoints/{TRACKER}", f"final/{_CONFIG}", f"best/{_CONFIG}")
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and any((folder / sign).is_file() for sign in signs):
            yield folder


def _losses(checkpoint: Path, step: int | None) -> tuple[tuple[str, float], ...]:
    """Return the validation losses that pretraining measured at the step of a checkpoint."""
    file = checkpoint.parent.parent / "metrics.jsonl"
    if step is None or checkpoint.parent.name != "checkpoints":
        return ()
    losses: dict[str, float] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    for line in lines:
        if '"val_loss' not in line:
            continue
        try:
            row = load_json(line)
        except ValueError:  # the last line of a killed run
            continue
        if row.get("step") == step:
            names = {name: name.replace("val_loss", "validation loss", 1) for name in row}
            losses |= {
                label: float(row[name])
                for name, label in names.items()
                if name.startswith("val_loss") and isinstance(row[name], int | float)
            }
    return tuple(losses.items())


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def model_content(path: Path) -> str:
    """Return a fingerprint of a model that takes milliseconds, whatever the model's size.

    It covers the settings, the tokenizer, and of each file of weights the size and sixteen evenly
    spaced blocks of 16 KiB. Training changes all of a model's weights, so that other weights of the
    same shape differ in these blocks. A copy of the folder has the same fingerprint.

    Args:
        path: A Hugging Face folder, a run directory, or a folder of checkpoints.
    """
    digest = hashlib.sha256()
    try:
        folder = locate_model(path).folder
    except UserError:  # loading the model reports the error
        return ""
    for name in _SETTINGS:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for number in range(_SAMPLES):
                    stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
