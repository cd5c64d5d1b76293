"""Checks of a run before its first collective, and the start of the run."""

import importlib.metadata
import json
import platform
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import IO, Any

import torch

from megatron_ext.config import ETConfig
from megatron_ext.data.run_tokenizer import keep_tokenizer
from megatron_ext.data.tokenizer_identity import (
    tokenizer_digest,
)
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.processes import lock_folder
from megatron_ext.training.blends import check_enough_samples, data_digest
from megatron_ext.training.input_checks import check_inputs
from megatron_ext.training.launch import Launch
from megatron_ext.training.resume_checks import check_resuming
from megatron_ext.training.run_folder import (
    Start,
    check_not_overwritten,
    plain,
    recorder,
    why_finished,
)
from megatron_ext.training.run_progress import RunProgress
from megatron_ext.training.saving import choose_checkpoint


def check_run(args: Namespace, config: ETConfig, launch: Launch) -> Start:
    """Check flags, data, pools and the checkpoint to resume from, and claim the run directory.

    Raises:
        UserError: A check failed; the message names the flag or file and the fix, on every rank.
    """
    args.tokenizer_sha256 = tokenizer_digest(args)  # so that checkpoints contain it
    check_same_settings(args, launch)
    run_dir = None if args.run_dir is None else Path(args.run_dir)
    locks: list[IO[str]] = []

    def claim() -> None:
        if launch.rank == 0 and run_dir is not None:
            locks.append(lock_folder(run_dir))

    run_dir_exists = launch.share("run directory", run_dir is not None and run_dir.is_dir())
    if run_dir_exists:  # lock it before reading from it
        launch.agree("lock", claim)
    launch.agree("inputs", lambda: check_inputs(args, config))
    digest = data_digest(args) if launch.rank == 0 else None
    args.data_sha256 = launch.share("data", digest)
    checkpoint = check_checkpoint(args, config, launch)
    progress = check_progress(checkpoint, args, launch)
    if not run_dir_exists:  # create it last, so that a refused run leaves no folder
        launch.agree("lock", claim)
    start = Start(run_dir, progress, lock=locks[0] if locks else None)
    start.finished = launch.share("finished", why_finished(args, progress))

    def keep() -> None:
        if launch.rank == 0 and run_dir is not None and not start.finished:
            keep_tokenizer(args, run_dir)

    launch.agree("tokenizer", keep)
    if launch.rank == 0 and run_dir is not None:
        start.record = recorder(run_dir, args, {"commit": commit(), "versions": versions()})
    return start


def check_progress(checkpoint: Path | None, args: Namespace, launch: Launch) -> RunProgress:
    """Return the progress of a checkpoint after checking that the data suffice for the rest.

    Raises:
        UserError: The data would run out; the message names them, on every rank.
    """
    progress = RunProgress.share(checkpoint, args, launch)
    launch.agree(
        "samples", lambda: check_enough_samples(args, progress) if args.local_rank == 0 else None
    )
    return progress


def check_same_settings(args: Namespace, launch: Launch) -> None:
    """Compare flags and versions of all ranks.

    Raises:
        UserError: A rank differs from rank 0; the message names it, on every rank.
    """
    settings = launch.share("settings", _settings(args))
    launch.agree("flags", lambda: _check_same_settings(settings, args))


def check_checkpoint(args: Namespace, config: ETConfig, launch: Launch) -> Path | None:
    """Return the checkpoint to resume from, intact and of the same model, or None.

    Raises:
        UserError: A file is damaged or a flag differs; the message names it, on every rank.
    """
    checkpoint = choose_checkpoint(args, launch) if args.load is not None else None

    def check() -> None:
        if launch.rank == 0:
            check_not_overwritten(args)
            if checkpoint is not None:
                check_resuming(checkpoint, args, config)

    launch.agree("checkpoint", check)
    return checkpoint


def _settings(args: Namespace) -> dict[str, Any]:
    """Return everything that must be equal on all ranks."""
    settings = {
        name: plain(value)
        for name, value in sorted(vars(args).items())
        if name not in ("rank", "local_rank")
    }
    return json.loads(json.dumps(settings | versions()))


def _check_same_settings(rank_0: dict[str, Any], args: Namespace) -> None:
    """Compare the settings of this rank with those of rank 0."""
    settings = _settings(args)
    for name in sorted(rank_0.keys() | settings.keys()):
        if rank_0.get(name) != settings.get(name):
            raise UserError(
                f"Rank {args.rank} on {platform.node()} was started with {name} = "
                f"{settings.get(name)} and rank 0 with {rank_0.get(name)}. Start all ranks with "
                "the same command and environment."
            )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results of a run."""
    packages = ("torch", "megatron-core", "transformer-engine", "numpy")
    installed = {name: version for name in packages if (version := _version(name))}
    if not is_cpu_device():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        installed |= {"cuda": str(torch.version.cuda), "nccl": nccl}
    return {"python": platform.python_version(), **installed}


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this project, or None outside of a Git repository."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
