"""Host memory that a rank on a CPU needs in addition while it saves a checkpoint."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

_ADAM_STATE = 12
"""Bytes per parameter of AdamW's state in a checkpoint: fp32 weight and two moments."""


def saving_bytes(args: Namespace, stages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the bytes that a save needs on the first data-parallel rank.

    The weights, which are parts of a buffer with the distributed optimizer, are copied. So are the
    fp32 weights of the optimizer on one rank, whose moments are written where they are. Of several
    ranks the first receives the optimizer's state; see `megatron_ext.training.gathering`.

    Args:
        args: Validated arguments of the run.
        stages: Facts of the pipeline stages: `parameters`, and `memory` by purpose.

    Returns:
        Bytes of the stage that needs most; None for other optimizers and asynchronous saves.
    """
    if args.optimizer != "adam" or args.async_save:
        return None
    stage = max(stages, key=lambda stage: stage["parameters"])
    weights, count = stage["memory"]["parameters"], stage["parameters"]
    if not args.use_distributed_optimizer or args.no_save_optim:
        return int(weights)
    if args.data_parallel_size * args.context_parallel_size > 1:
        return int(weights + _ADAM_STATE * count)
    main = 0 if args.bf16 or args.fp16 else 4 * count  # otherwise separate tensors
    return int(weights + main)


def describe_saving(size: int) -> str:
    """Return a sentence on the result of `saving_bytes`."""
    return (
        f"On CPUs, saving a checkpoint takes up to {size / 2**20:,.0f} MiB in addition "
        "on the first data-parallel rank."
    )
