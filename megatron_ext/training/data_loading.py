"""Data of a training run: Megatron's datasets, batches, forward step and loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_ext.errors import UserError

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def train_valid_test_datasets(
    samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the three splits on the ranks that read data.

    Args:
        samples: Numbers of samples for training, validation and test.
        vp_stage: Virtual pipeline stage, or None without interleaving.

    Returns:
        The training, validation and test datasets, None on ranks that read no data.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = _DatasetConfig(
        data_sha256=getattr(args, "data_sha256", None),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    dataset = MockGPTDataset if args.mock_data else _Dataset
    is_built_on_rank = partial(_reads_data, vp_stage)
    return BlendedMegatronDatasetBuilder(dataset, samples, is_built_on_rank, config).build()


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    """Configuration with the digest of the datasets' indices."""

    data_sha256: str | None = None


class _Dataset(GPTDataset):
    """Dataset whose cached sample index is used only for the content that it was made for.

    Megatron looks a cached index up by the path of the dataset. After `preprocess_data --overwrite`
    it would read the samples of the earlier content.
    """

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "data_sha256"]


# With this mark Megatron calls the function on every rank, not only on the first rank of each
# tensor-parallel group.
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def _reads_data(vp_stage: int | None) -> bool:
    """Return whether this rank reads data in a virtual pipeline stage."""
    first = mpu.get_tensor_model_parallel_rank() == 0
    return first and is_first_or_last_pipeline_stage(vp_stage)


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Run the forward pass of a micro-batch, as Megatron's schedules require.

    Args:
        data_iterator: Iterator over micro-batches.
        model: Model, or its part in this pipeline stage.

    Returns:
        The losses by token in nats, `[batch, sequence]`, or the activations of a stage, and the
        function that reduces the losses.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = _get_batch(data_iterator, vp_stage)
    timers("batch-generator").stop()
    losses = model(
        *(batch["tokens"], batch["position_ids"], None),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    # Only the last stage calls the function, and the mask is None on inner stages.
    return losses, partial(loss_sum, cast(Tensor, batch["loss_mask"]))


def _get_batch(data_iterator: Iterator[Any], vp_stage: int | None) -> dict[str, Tensor | None]:
    """Return this rank's part of the next micro-batch, without tensors on inner pipeline stages."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_FIELDS)
    args = get_args()
    batch: dict[str, Tensor | None] = {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        try:
            sample = next(data_iterator)
        except OSError as error:
            raise UserError(
                f"The data cannot be read any more: {error}. Restore it and run the same "
                "command again to resume."
            ) from error
        batch = {name: sample[name].cuda(non_blocking=True) for name in _FIELDS}
        batch["attention_mask"] = None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(
            args.pipeline_model_parallel_layout,
            args.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        ),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch.setdefault("cu_seqlens", None)
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def loss_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: 1 where a token counts and 0 elsewhere, `[batch, sequence]`.
        losses: Losses by token in nats, `[batch, sequence]`.

    Returns:
        The sum of the losses, the number of tokens that count, and both for the logs.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if args.check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=total,
            rejection_func=lambda loss: ~torch.isfinite(loss),
            message="the loss of a micro-batch is NaN or infinite",
            tolerance=0.0,
            fatal=True,
        )
    report = torch.stack([total.detach(), tokens.float()])
    return total, tokens, {"lm loss": report}
