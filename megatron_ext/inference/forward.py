"""One forward pass of a trained model, through all stages of its pipeline."""

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_ext.inference.loading import TrainedModel


@torch.no_grad()
def next_token_logits(
    trained: TrainedModel, tokens: Tensor, context: StaticInferenceContext
) -> Tensor | None:
    """Run new tokens against the cache of earlier ones, and add them to it.

    Args:
        tokens: int64 `[batch, new]`, the next of every row: the first call may bring many, later
            ones bring one.
        context: the cache. Its `sequence_len_offset` is moved here.

    Returns:
        logits after the last token, `[batch, padded vocabulary]`, on the last pipeline stage; None
        on the others.
    """
    with InferenceMode.active():  # materialises the logits of the last token only
        logits = _through_the_pipeline(trained, tokens, context)
    context.sequence_len_offset += tokens.shape[1]
    return None if logits is None else logits[:, -1]


@torch.no_grad()
def full_logits(trained: TrainedModel, tokens: Tensor) -> Tensor | None:
    """Logits after every token, without a cache.

    Args:
        tokens: int64 `[batch, sequence]`.

    Returns:
        `[batch, sequence, padded vocabulary]` on the last pipeline stage; None on the others.
    """
    return _through_the_pipeline(trained, tokens, None)


def _through_the_pipeline(
    trained: TrainedModel, tokens: Tensor, context: StaticInferenceContext | None
) -> Tensor | None:
    model, pipeline = trained.model, trained.groups.pp
    batch, length = tokens.shape
    start = context.sequence_len_offset if context else 0
    positions = torch.arange(start, start + length, device=tokens.device).expand(batch, -1)
    if pipeline.rank() > 0:
        hidden = torch.empty(
            (length, batch, model.config.hidden_size),
            dtype=trained.args.params_dtype,
            device=tokens.device,
        )
        dist.recv(hidden, group=pipeline, group_src=pipeline.rank() - 1)
        model.set_input_tensor(hidden)
    output = trained.module(
        tokens, positions, None, inference_context=context, runtime_gather_output=True
    )
    if pipeline.rank() == pipeline.size() - 1:
        return output
    dist.send(output.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
    return None
