"""Bytes of text per token of a run's data, by which losses of different tokenizers compare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NATS, BITS = "nats per token", "bits per byte"
_SPLITS = {"train": ("train_data_path", "data_path"), "valid": ("valid_data_path",)}


def bytes_per_token(settings: Mapping[str, Any], split: str) -> float | None:
    """Return the UTF-8 bytes of the text per token of a dataset, from its manifest.

    The tokens that end documents count, as they have a loss too: nats per token divided by this
    number are nats per byte of text.

    Args:
        settings: Settings from run.json, which name the datasets.
        split: "train" or "valid".

    Returns:
        The number over all datasets of the split; None if a manifest does not have it.
    """
    prefixes = next((paths for name in _SPLITS[split] if (paths := settings.get(name))), None)
    if not isinstance(prefixes, list):
        return None
    all_counts = [_counts(Path(prefix)) for prefix in prefixes if not _is_weight(prefix)]
    if not all_counts or None in all_counts:
        return None
    total_bytes, tokens = (sum(counts[i] for counts in all_counts if counts) for i in (0, 1))
    return total_bytes / tokens if tokens else None


def _is_weight(word: Any) -> bool:
    try:
        float(word)
    except (TypeError, ValueError):
        return False
    return True


def _counts(prefix: Path) -> tuple[int, int] | None:
    """Return the bytes and tokens of a dataset; None if its manifest does not have them."""
    name = prefix.name.removesuffix("_text_document")
    text, _, split = name.rpartition("_")
    try:
        content = json.loads(prefix.with_name(f"{text}.json").read_text(encoding="utf-8"))
        counts = content["splits"][split]
        return int(counts["bytes"]), int(counts["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
