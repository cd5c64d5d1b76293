"""Checks of one run: its flags, memory, data and folders."""

import os
import platform
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.arguments import parse_args
from megatron_ext.config import ETConfig
from megatron_ext.data.tokenizer_identity import tokenizer_digest
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.planning.devices import host_memory
from megatron_ext.planning.preflight import storage_checks as storage
from megatron_ext.planning.preflight.findings import OK, WARNING, CheckResult
from megatron_ext.planning.preflight.rank_memory import GIB, memory_of_a_rank
from megatron_ext.training import checks, input_checks
from megatron_ext.training.launch import Launch
from megatron_ext.training.run_folder import why_finished

_FULL = 0.9  # usable share of a device's memory, without CUDA, NCCL, fragments, uneven routing


def configuration(flags: Sequence[str], ranks: int) -> tuple[Namespace, ETConfig]:
    """Parse the flags of `pretrain_et.py` for a run of this many ranks.

    Raises:
        UserError: A flag is wrong, or flags do not fit each other.
    """
    args, config = parse_args(flags, writes=False, world_size=ranks)
    args.tokenizer_sha256 = tokenizer_digest(args)
    return args, config


def layout(args: Namespace) -> CheckResult:
    """Return the parallel layout in words."""
    return CheckResult(
        f"{args.world_size:,} ranks: {args.tensor_model_parallel_size} tensor x "
        f"{args.context_parallel_size} context x {args.pipeline_model_parallel_size} pipeline x "
        f"{args.data_parallel_size} data x {args.expert_model_parallel_size} expert"
    )


def same_settings(args: Namespace, launch: Launch) -> CheckResult:
    """Check that all ranks have the same flags and versions."""
    checks.check_same_settings(args, launch)
    versions = (f"{name} {version}" for name, version in checks.versions().items())
    return CheckResult("all flags, and " + ", ".join(versions))


def routing(args: Namespace, config: ETConfig) -> CheckResult:
    """Return the tokens of a step and the mean number of them that an expert takes."""
    tokens = args.global_batch_size * args.seq_length
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    message = f"{tokens:,} tokens a step in {micro_batches} micro-batch(es)"
    if not config.uses_thresholds:
        return CheckResult(message)
    input_checks.check_pools(args, config)
    pool = tokens // micro_batches
    k = config.routing_rate.k(pool)
    return CheckResult(
        f"{message}; k = {k:,} of a micro-batch's {pool:,} go to an expert on average"
    )


def memory(facts: dict[str, Any], device_memory: float | None, alone: bool) -> CheckResult:
    """Compare the memory that a rank needs with that of its device.

    Args:
        facts: Facts of the dry run.
        device_memory: Memory in GiB of the device to compare with, or None for this rank's.
        alone: Whether this process checks a run whose ranks are on other machines.

    Raises:
        UserError: The memory is not enough.
    """
    needed, stage = memory_of_a_rank(facts)
    message = f"{needed / GIB:,.3g} GiB" + (
        f" in stage {stage}" if len(facts["stages"]) > 1 else ""
    )
    if device_memory is not None:
        limit, source = device_memory * GIB, "of --device-memory"
    elif not is_cpu_device():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        limit, source = device.total_memory, f"of {device.name} on {platform.node()}"
    elif alone:
        return CheckResult(f"{message}; --device-memory GIB compares it with a device")
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = host_memory() / ranks
        source = f"that {platform.node()} has for each of {ranks} rank(s)"
    message = f"{message} of the {limit / GIB:,.3g} GiB {source}"
    if needed <= _FULL * limit:
        return CheckResult(message)
    message += (
        ": raise the tensor, pipeline or expert parallel size, lower --micro-batch-size, or "
        "recompute activations (--recompute-granularity full)"
    )
    if needed > limit:
        raise UserError(message)
    return CheckResult(message, WARNING)


def data(args: Namespace, config: ETConfig) -> CheckResult:
    """Check that datasets are complete, long enough and made with the tokenizer of the run."""
    if args.mock_data:
        return CheckResult("--mock-data: nothing to read")
    input_checks.check_inputs(args, config)
    return CheckResult(
        f"datasets are complete and match the tokenizer of {args.vocab_size:,} tokens"
    )


def folder(args: Namespace, launch: Launch) -> CheckResult:
    """Check that checkpoints can be written, to a folder that all nodes share."""
    if args.save is None:
        return CheckResult("nothing will be saved: add --run-dir to save", WARNING)
    written: list[str] = []

    def write() -> None:
        if launch.rank == 0:
            written.append(storage.write_token(args))

    launch.agree("token", write)
    name = launch.share("token's name", "".join(written))
    try:
        launch.agree("token is visible", lambda: storage.check_token(name, platform.node()))
    finally:
        if launch.rank == 0:
            os.remove(name)
    shared = " and is shared by all nodes" if launch.size > 1 else ""
    return CheckResult(f"{Path(name).parent} can be written{shared}")


def resuming(args: Namespace, config: ETConfig, launch: Launch) -> CheckResult:
    """Check that the checkpoint to resume from is intact and fits the flags."""
    checkpoint = checks.check_checkpoint(args, config, launch)
    progress = checks.check_progress(checkpoint, args, launch)
    if finished := why_finished(args, progress):
        return CheckResult(finished, WARNING)
    return CheckResult(
        "none; training starts at step 0" if checkpoint is None else f"{checkpoint} is intact"
    )


def room(args: Namespace, facts: dict[str, Any], keep: int) -> CheckResult:
    """Check that there is room for checkpoints.

    Args:
        args: Validated arguments of the run.
        facts: Facts of the dry run.
        keep: Number of checkpoints that must fit.
    """
    size = storage.checkpoint_bytes(args, facts)
    enough, message = storage.check_room(args, size, keep)
    return CheckResult(message, OK if enough else WARNING, {"bytes": size})
