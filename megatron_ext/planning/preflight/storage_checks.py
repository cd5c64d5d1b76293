"""Checks of the folder of checkpoints: that it can be written, and how many fit."""

import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.training.run_progress import RunProgress

GB = 1e9


def nearest_folder(path: str) -> Path:
    """Return the folder itself, or the nearest parent folder that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def write_token(args: Namespace) -> str:
    """Write a small file where checkpoints will go, and return its name.

    Raises:
        UserError: The file cannot be written.
    """
    folder = nearest_folder(args.save)
    try:
        handle, name = tempfile.mkstemp(prefix=".preflight-", dir=folder)
        with open(handle, "wb") as file:
            file.write(os.urandom(2**16))
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"Nothing can be written in {folder} ({error.strerror}). Choose another --run-dir or "
            "--save, or free space."
        ) from error
    return name


def check_token(name: str, node: str) -> None:
    """Check that a file that rank 0 wrote is visible on this node.

    Args:
        name: Path of the file.
        node: Name of this node, for the message.

    Raises:
        UserError: The file is not visible.
    """
    if not Path(name).is_file():
        raise UserError(
            f"{node} does not see {Path(name).parent} of rank 0's node: --run-dir or --save must "
            "be on a file system that all nodes share."
        )


def checkpoint_bytes(args: Namespace, facts: dict[str, Any]) -> int:
    """Return the bytes of one checkpoint: weights and optimizer state.

    Every optimizer but SGD counts with two moments in fp32, as Adam has them; none has more.
    """
    half = args.bf16 or args.fp16
    weights = 2 if half else 4
    main = 4 if half or args.use_distributed_optimizer else 0
    optimizer = 0 if args.no_save_optim else main + (4 if args.optimizer == "sgd" else 8)
    return facts["parameters"]["total"] * (weights + optimizer)


def check_room(args: Namespace, size: int, keep: int) -> tuple[bool, str]:
    """Compare the free space with the size of checkpoints.

    Args:
        args: Validated arguments of the run.
        size: Bytes of one checkpoint.
        keep: Number of checkpoints that must fit.

    Returns:
        Whether all checkpoints of the run fit, and the sizes as a sentence.

    Raises:
        UserError: `keep` checkpoints do not fit.
    """
    folder = nearest_folder(args.save)
    free = shutil.disk_usage(folder).free
    message = f"{free / GB:,.3g} GB free in {folder}, a checkpoint takes {size / GB:,.3g} GB"
    if keep * size > free:
        raise UserError(
            f"{message} and {keep} must fit. Free space, choose another --run-dir or --save, or "
            "lower --keep-checkpoints."
        )
    interval = args.save_retain_interval or args.save_interval
    steps = RunProgress().last_step(args)
    total = -(-steps // interval) if interval else 1
    if total * size <= free:
        return True, f"{message}; the run keeps {total}"
    return False, (
        f"{message}, but the run will keep {total}: use --save-retain-interval or a larger "
        "--save-interval, or remove old checkpoints during the run"
    )
