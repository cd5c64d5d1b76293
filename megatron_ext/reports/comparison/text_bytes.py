"""Bytes of text per token of a run's data, by which losses of different tokenizers compare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.blend_words import parse_blend
from megatron_ext.errors import UserError

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
        The number over all datasets of the split, of which each has the share of its weight in the
        tokens, or without weights that of its size; None if a manifest does not have it.
    """
    words = next((paths for name in _SPLITS[split] if (paths := settings.get(name))), None)
    if not isinstance(words, list):
        return None
    try:
        prefixes, weights = parse_blend(words, f"{split} data")
    except UserError:
        return None
    counts = [pair for prefix in prefixes if (pair := _counts(Path(prefix))) is not None]
    if len(counts) < len(prefixes) or not all(tokens for _, tokens in counts):
        return None
    sizes, tokens = zip(*counts)
    shares = tokens if weights is None else weights
    return float(np.average(np.divide(sizes, tokens), weights=shares))


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
