"""Checks of a run before its first collective, and the start of the run."""

import importlib.metadata
import json
import platform
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.checkpoint import TRACKER, find_checkpoint, read_common_state
from megatron_ext.config import ETConfig
from megatron_ext.data.run_tokenizer import keep_tokenizer
from megatron_ext.data.tokenizer_identity import (
    check_dataset_tokenizer,
    check_model_tokenizer,
    tokenizer_digest,
)
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.model.identity import check_same_model, check_same_schedule
from megatron_ext.moe.registry import ROUTERS, router_type
from megatron_ext.processes import lock_folder
from megatron_ext.training.blends import (
    blends,
    check_documents,
    check_enough_samples,
    check_mock_split,
)
from megatron_ext.training.launch import Launch
from megatron_ext.training.resharding import check_resharding
from megatron_ext.training.run_folder import (
    Start,
    check_not_overwritten,
    plain,
    recorder,
    why_finished,
)
from megatron_ext.training.saving import choose_checkpoint
from megatron_ext.training.schedule import RunProgress


def check_run(args: Namespace, config: ETConfig, launch: Launch) -> Start:
    """Check flags, data, pools and the checkpoint to resume from, and claim the run directory.

    Raises:
        UserError: A check failed; the message names the flag or file and the fix, on every rank.
    """
    args.tokenizer_sha256 = tokenizer_digest(args)  # saved in checkpoints with the rest
    check_same_settings(args, launch)
    run_dir = None if args.run_dir is None else Path(args.run_dir)
    locks: list[IO[str]] = []

    def claim() -> None:
        if launch.rank == 0 and run_dir is not None:
            locks.append(lock_folder(run_dir))

    was_there = launch.share("run directory", run_dir is not None and run_dir.is_dir())
    if was_there:  # locked before it is read
        launch.agree("lock", claim)
    launch.agree("inputs", lambda: check_inputs(args, config))
    checkpoint = check_checkpoint(args, config, launch)
    progress = check_progress(checkpoint, args, launch)
    if not was_there:  # a run that is refused leaves no folder
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
                _check_checkpoint(checkpoint, args, config)

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
                f"rank {args.rank} on {platform.node()} was started with {name} = "
                f"{settings.get(name)} and rank 0 with {rank_0.get(name)}: start all ranks alike"
            )


def check_inputs(args: Namespace, config: ETConfig) -> None:
    """Check the data, once on each node, and the routing pools.

    Raises:
        UserError: A check failed; the message names the file or flag and the fix.
    """
    if args.mock_data:
        check_mock_split(args)
    elif args.local_rank == 0:
        _check_data(args)
    if args.pretrained_checkpoint is not None and args.local_rank == 0:
        _check_pretrained(args)
    if config.uses_thresholds:
        check_pools(args, config)


def _check_pretrained(args: Namespace) -> None:
    """Compare the flags with the pretrained weights, which count if --load has no checkpoint."""
    if args.load is not None and Path(args.load, TRACKER).is_file():
        return
    if not Path(args.pretrained_checkpoint, TRACKER).is_file():  # Megatron reads this file alone
        raise UserError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} has no {TRACKER}: use a "
            "folder of checkpoints, such as RUN_DIR/checkpoints"
        )
    checkpoint = find_checkpoint(args.pretrained_checkpoint)
    saved = read_common_state(checkpoint)["args"]
    check_same_model(checkpoint, saved, args)
    check_model_tokenizer(checkpoint, saved, args)


def _check_data(args: Namespace) -> None:
    """Check every dataset of the run, and the documents of every split."""
    used = blends(args)
    for prefix in dict.fromkeys(prefix for blend in used for prefix in blend.prefixes):
        _check_dataset(prefix, args)
    check_documents(used, args)


def _check_dataset(prefix: str, args: Namespace) -> None:
    """Check existence, completeness, length and tokenizer of one indexed dataset."""
    files = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("idx", "bin")}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"dataset file {file} does not exist: make it with preprocess_data")
        if file.stat().st_size == 0:
            raise UserError(f"dataset file {file} is empty: make it again with preprocess_data")
    try:
        dataset = _Dataset(prefix)
    except Exception as error:
        raise UserError(
            f"dataset index {files['idx']} is damaged: make it again with preprocess_data"
        ) from error
    tokens = int(dataset.sequence_lengths.sum())
    expected = tokens * np.dtype(dataset.index.dtype).itemsize
    if files["bin"].stat().st_size != expected:
        raise UserError(
            f"dataset file {files['bin']} has {files['bin'].stat().st_size:,} bytes, but its "
            f"index says {expected:,}: it is truncated, make it again with preprocess_data"
        )
    if tokens <= args.seq_length:
        raise UserError(
            f"dataset {prefix} has {tokens:,} tokens, fewer than a sample of --seq-length "
            f"{args.seq_length} needs: add text or lower --seq-length"
        )
    check_dataset_tokenizer(prefix, args, f"--tokenizer-model {args.tokenizer_model}")


class _Dataset(IndexedDataset):
    """Dataset that can be deleted after it failed to open."""

    def __del__(self) -> None:
        if hasattr(self, "index"):  # otherwise it failed to open, which Megatron would report again
            super().__del__()


def check_pools(args: Namespace, config: ETConfig) -> None:
    """Refuse pools in which the share of an expert is less than one token.

    Raises:
        UserError: A pool is too small, or too large for the memory of its router logits.
    """
    rate = config.routing_rate
    per_rank = args.micro_batch_size * args.seq_length // args.context_parallel_size
    pool = per_rank * args.data_parallel_size * args.context_parallel_size
    least = -(-1 // rate.rate)
    if rate.k(pool) < 1:
        raise UserError(
            f"an expert takes {float(rate.rate):g} of the tokens, less than one of the {pool} in "
            f"a micro-batch of all ranks: raise --micro-batch-size or --seq-length to make it at "
            f"least {least}"
        )
    per_rank //= args.tensor_model_parallel_size
    if config.et_cutoff_pool == "step":
        micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        needed = 4 * per_rank * micro_batches * config.num_moe_experts
        if needed > config.logit_buffer_bytes:
            raise UserError(
                f"--et-cutoff-pool step keeps the router logits of a whole step, and "
                f"--et-logit-buffer-mb {config.et_logit_buffer_mb:g} has room for only "
                f"{config.logit_buffer_bytes / needed:.0%} of them: raise it, or use "
                "--et-cutoff-pool microbatch"
            )
    # Expert choice selects the top k of the whole pool and ignores the capacity.
    limited = config.router.trains_by_threshold and config.et_capacity is not None
    limited &= config.et_capacity_pool == "rank"
    if limited and rate.k(per_rank) < 1:
        raise UserError(
            f"an expert takes {float(rate.rate):g} of the tokens, less than one of a rank's "
            f"{per_rank}: use --et-capacity-pool global, or micro-batches of at least {least} "
            "tokens a rank"
        )


# Settings that the learning rate schedule of a resumed run must share with the checkpoint.
_SAME_SCHEDULE = (
    "train_iters",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "train_samples",
    "lr_decay_samples",
    "lr_warmup_samples",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "step_batch_size_schedule",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
    "muon_embedding_lr",
    "muon_head_lr",
    "muon_reference_width",
    "muon_momentum_warmup_iters",
)


# Other settings of the optimizer that a resumed run must share with the checkpoint.
_SAME_OPTIMIZER = (
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
    "muon_momentum",
    "clip_grad",
)


def _check_checkpoint(checkpoint: Path, args: Namespace, config: ETConfig) -> None:
    """Compare the flags with those of the checkpoint that training would resume from."""
    saved = read_common_state(checkpoint)["args"]
    had_thresholds = (
        saved.num_experts is not None and router_type(saved.router_type).uses_thresholds
    )
    if config.uses_thresholds != had_thresholds and saved.router_type != args.router_type:
        sharing = " and ".join(name for name, kind in ROUTERS.items() if kind.uses_thresholds)
        raise UserError(
            f"{checkpoint} was trained with --router-type {saved.router_type} and cannot continue "
            f"as {args.router_type}: only {sharing} share thresholds"
        )
    check_resharding(checkpoint, saved, args)
    check_same_model(checkpoint, saved, args)
    # A converted checkpoint has only weights, and --finetune loads only weights.
    weights_only = args.finetune or getattr(saved, "no_save_optim", False)
    flags_decide = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if not (weights_only or flags_decide):
        for name in _SAME_SCHEDULE:
            current, previous = (_schedule_setting(a, name) for a in (args, saved))
            if current != previous and hasattr(saved, name):  # older checkpoints have fewer flags
                raise UserError(
                    f"{checkpoint} was trained with {name} = {previous}, but the flags say "
                    f"{current}: use --override-opt-param-scheduler to resume with the flags, or "
                    "--use-checkpoint-opt-param-scheduler to keep the checkpoint's schedule"
                )
    if not (weights_only or args.override_opt_param_scheduler or args.skip_train):
        check_same_schedule(checkpoint, saved, args)
        for name in () if args.no_load_optim else _SAME_OPTIMIZER:
            current, previous = getattr(args, name), getattr(saved, name, getattr(args, name))
            if current != previous:
                raise UserError(
                    f"{checkpoint} was trained with {name} = {previous}, but the flags say "
                    f"{current}: make them equal, or use --override-opt-param-scheduler to train "
                    "with the flags"
                )
    check_model_tokenizer(checkpoint, saved, args)


def _schedule_setting(args: Namespace, name: str) -> Any:
    """Return a setting of the learning rate schedule, or Megatron's default for it.

    Megatron stores the steps that it derives from `--train-samples` in the arguments of a run, and
    thus in its checkpoints, although no flag sets them.
    """
    samples = getattr(args, "train_samples", None)
    if samples and name in ("train_iters", "lr_decay_iters"):
        return None
    defaults = {"lr_decay_iters": args.train_iters, "lr_decay_samples": samples}
    value = getattr(args, name, None)
    return defaults.get(name) if value is None else value


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
