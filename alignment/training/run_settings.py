"""Settings that must be the same when a run resumes, and fingerprints of its models."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.row_files import expand_row_files
from megatron_ext.errors import UserError
from megatron_ext.model_location import locate_model
from megatron_ext.typed_flags import flag_values, flags_of

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


def lasting_settings(config: Any, files: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that must be the same when a run resumes, as JSON values.

    These are the flags that are not marked `may_change`. A template in a file is represented by its
    digest, and a model's folder by its path and a fingerprint of its content.

    Args:
        config: Configuration of the command, a dataclass of flags.
        files: Names of flags whose files are represented by their digests, not by their names.
    """
    marks = {flag.name: flag.resume for flag in flags_of(type(config))}
    settings = {
        name: value for name, value in flag_values(config).items() if marks[name] != "may change"
    }
    for name in ("template", "chat_template"):
        if settings.get(name) and (file := Path(settings[name])).is_file():
            settings[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("model", "critic"):
        if settings.get(name) and Path(settings[name]).is_dir():
            settings[f"{name}_content"] = model_content(Path(settings[name]))
    for name in files:
        paths = [Path(path) for path in expand_row_files(list(settings[name]))]
        settings[name] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return settings


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
