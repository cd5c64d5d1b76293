"""Whether checkpoints can be written where the run wants them, and how many fit."""

import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

GB = 1e9


def nearest_folder(path: str) -> Path:
    """The folder itself, or the nearest above it that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def write_token(args: Namespace) -> str:
    """Write a small file where checkpoints will go, and return its name.

    Raises:
        UserError: it cannot be written.
    """
    folder = nearest_folder(args.save)
    try:
        handle, name = tempfile.mkstemp(prefix=".preflight-", dir=folder)
        with open(handle, "wb") as file:
            file.write(os.urandom(2**16))
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"nothing can be written in {folder} ({error.strerror}): give another --run-dir or "
            "--save, or make room"
        ) from error
    return name


def check_token(name: str, node: str) -> None:
    """See whether another node's file is there.

    Raises:
        UserError: it is not.
    """
    if not Path(name).is_file():
        raise UserError(
            f"{node} does not see {Path(name).parent} of rank 0's node: --run-dir or --save must "
            "be on a file system that all nodes share"
        )


def checkpoint_bytes(args: Namespace, facts: dict[str, Any]) -> int:
    """Bytes of one checkpoint: weights, and what the optimizer keeps of each.

    Moments count with Adam's two in fp32, of which other optimizers keep no more.
    """
    half = args.bf16 or args.fp16
    weights = 2 if half else 4
    main = 4 if half or args.use_distributed_optimizer else 0
    optimizer = 0 if args.no_save_optim else main + (4 if args.optimizer == "sgd" else 8)
    return facts["parameters"]["total"] * (weights + optimizer)


def check_room(args: Namespace, size: int, keep: int) -> tuple[bool, str]:
    """Compare the room for checkpoints with what is wanted.

    Args:
        args: of the run.
        size: bytes of one checkpoint.
        keep: how many must fit.

    Returns:
        whether all that the run will write fit, and the figures in words.

    Raises:
        UserError: `keep` do not fit.
    """
    folder = nearest_folder(args.save)
    free = shutil.disk_usage(folder).free
    message = f"{free / GB:,.3g} GB free in {folder}, a checkpoint takes {size / GB:,.3g} GB"
    if keep * size > free:
        raise UserError(
            f"{message} and {keep} must fit: make room, give another --run-dir or --save, or lower "
            "--keep-checkpoints"
        )
    interval = args.save_retain_interval or args.save_interval
    steps = args.train_iters or 0
    kept = -(-steps // interval) if interval else 1
    if kept * size <= free:
        return True, f"{message}; the run keeps {kept}"
    return False, (
        f"{message}, but the run will keep {kept}: give --save-retain-interval, a larger "
        "--save-interval, or remove old ones as it goes"
    )
