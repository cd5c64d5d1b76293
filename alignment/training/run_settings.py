"""Settings that must be the same when a run resumes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.row_files import expand_row_files
from megatron_ext.model_location import model_content
from megatron_ext.typed_flags import flag_values, flags_of


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
