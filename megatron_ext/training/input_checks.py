"""Checks of the data, of the pretrained weights and of the routing pools of a run."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.checkpoint import TRACKER, find_checkpoint, read_common_state
from megatron_ext.config import ETConfig
from megatron_ext.data.tokenizer_identity import check_dataset_tokenizer, check_model_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.model.identity import check_same_model
from megatron_ext.training.blends import blends, check_documents, check_mock_split


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
    if not Path(args.pretrained_checkpoint, TRACKER).is_file():  # Megatron looks for no other file
        raise UserError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} has no {TRACKER}. Use a "
            "folder of checkpoints, such as RUN_DIR/checkpoints."
        )
    checkpoint = find_checkpoint(args.pretrained_checkpoint)
    saved = read_common_state(checkpoint)["args"]
    check_same_model(checkpoint, saved, args)
    check_model_tokenizer(checkpoint, saved, args)


def _check_data(args: Namespace) -> None:
    """Check every dataset of the run, and the documents of every split."""
    all_blends = blends(args)
    for prefix in dict.fromkeys(prefix for blend in all_blends for prefix in blend.prefixes):
        _check_dataset(prefix, args)
    check_documents(all_blends, args)


def _check_dataset(prefix: str, args: Namespace) -> None:
    """Check existence, completeness, length and tokenizer of one indexed dataset."""
    files = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("idx", "bin")}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"Dataset file {file} does not exist. Make it with preprocess_data.")
        if file.stat().st_size == 0:
            raise UserError(f"Dataset file {file} is empty. Make it again with preprocess_data.")
    try:
        dataset = _Dataset(prefix)
    except Exception as error:
        raise UserError(
            f"Dataset index {files['idx']} is damaged. Make it again with preprocess_data."
        ) from error
    tokens = int(dataset.sequence_lengths.sum())
    expected = tokens * np.dtype(dataset.index.dtype).itemsize
    if files["bin"].stat().st_size != expected:
        raise UserError(
            f"Dataset file {files['bin']} has {files['bin'].stat().st_size:,} bytes, but its "
            f"index says {expected:,}: it is truncated, make it again with preprocess_data."
        )
    if tokens <= args.seq_length:
        raise UserError(
            f"Dataset {prefix} has {tokens:,} tokens, fewer than a sample of --seq-length "
            f"{args.seq_length} needs. Add text or lower --seq-length."
        )
    check_dataset_tokenizer(prefix, args, f"--tokenizer-model {args.tokenizer_model}")


class _Dataset(IndexedDataset):
    """Dataset that can be deleted after it failed to open."""

    def __del__(self) -> None:
        if hasattr(self, "index"):  # without an index, Megatron's method would raise a second error
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
            f"An expert takes {float(rate.rate):g} of the tokens, less than one of the {pool} in "
            f"a micro-batch of all ranks. Raise --micro-batch-size or --seq-length to make it at "
            f"least {least}."
        )
    per_rank //= args.tensor_model_parallel_size
    if config.et_cutoff_pool == "step":
        micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        needed = 4 * per_rank * micro_batches * config.num_moe_experts
        if needed > config.logit_buffer_bytes:
            raise UserError(
                f"--et-cutoff-pool step keeps the router logits of a whole step, and "
                f"--et-logit-buffer-mb {config.et_logit_buffer_mb:g} has room for only "
                f"{config.logit_buffer_bytes / needed:.0%} of them. Raise it, or use "
                "--et-cutoff-pool microbatch."
            )
    # Expert choice selects the top k of the whole pool and ignores the capacity.
    limited = config.router.trains_by_threshold and config.et_capacity is not None
    limited &= config.et_capacity_pool == "rank"
    if limited and rate.k(per_rank) < 1:
        raise UserError(
            f"An expert takes {float(rate.rate):g} of the tokens, less than one of a rank's "
            f"{per_rank}. Use --et-capacity-pool global, or micro-batches of at least {least} "
            "tokens a rank."
        )
