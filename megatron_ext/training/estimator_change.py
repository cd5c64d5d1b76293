"""Loading of thresholds from a checkpoint without the state of their filters.

A run with `--et-threshold-estimator adaptive` can continue one with a moving average, or start from
a converted checkpoint, which has thresholds alone. Its filters then start at these thresholds.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_ext import patches
from megatron_ext.console import console
from megatron_ext.model.identity import setting_value
from megatron_ext.moe.thresholds import FILTER


def replacements() -> dict[str, Callable[..., Any]]:
    """Return Megatron's function that loads a checkpoint, for one without filters."""
    load = patches.original("megatron.core.dist_checkpointing.load")

    @wraps(load)
    def load_any(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        absent = _drop_absent_filters(sharded_state_dict, checkpoint_dir)
        result = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if absent:
            state = result[0] if isinstance(result, tuple) else result
            _resolve_averages(state, absent, checkpoint_dir)
        return result

    return {"megatron.core.dist_checkpointing.load": load_any}


def _drop_absent_filters(state: dict[str, Any], checkpoint: str) -> list[tuple[str, str]]:
    """Remove requests for filters that a checkpoint lacks.

    Args:
        state: Sharded state dict of a run, with an entry for each part of the model.
        checkpoint: Folder of one iteration.

    Returns:
        The part of the model and the name of each filter that was removed.
    """
    requested = [
        (part, name)
        for part, tensors in state.items()
        if part.startswith("model") and isinstance(tensors, dict)
        for name in tensors
        if name.endswith(FILTER)
    ]
    if not requested:
        return []
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    absent = [(part, name) for part, name in requested if state[part][name].key not in saved]
    for part, name in absent:
        del state[part][name]
    return absent


def _resolve_averages(
    state: dict[str, Any], absent: list[tuple[str, str]], checkpoint: str
) -> None:
    """Replace moving averages by the thresholds that they stand for, where filters start."""
    saved = state["args"]
    if setting_value(saved, "et_threshold_estimator") != "ema":
        return
    for part, name in absent:
        prefix = name.removesuffix("filter")
        average = state[part][f"{prefix}average"]
        if updates := int(state[part][f"{prefix}updates"]):
            correction = 1.0 - saved.et_ema_decay**updates
            average.copy_((average.double() / correction).float())
    if dist.get_rank() == 0:
        console.warn(
            f"{checkpoint} was trained with --et-threshold-estimator ema: the filters of adaptive "
            "start at its thresholds"
        )
