"""One forward pass of a trained model, through all stages of its pipeline."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_ext.inference.cache import Chunk, RaggedCache
from megatron_ext.inference.loading import TrainedModel


@torch.no_grad()
def next_logits(
    trained: TrainedModel, cache: RaggedCache, chunks: Sequence[Chunk]
) -> Tensor | None:
    """Run the next tokens of some rows, and add them to the cache.

    Args:
        chunks: at least one, those of one token first.

    Returns:
        the logits each chunk asks for, in order, `[wanted, padded vocabulary]`, on the last
        pipeline stage; None on the others.
    """
    tokens = cache.lay_out(chunks, torch.cuda.current_device())
    with InferenceMode.active():  # materialises only the logits that are asked for
        logits = _through_the_pipeline(trained, tokens, cache.positions, cache)
    return None if logits is None else logits[0]


@torch.no_grad()
def full_logits(trained: TrainedModel, tokens: Tensor) -> Tensor | None:
    """Logits after every token, without a cache.

    Args:
        tokens: int64 `[batch, sequence]`.

    Returns:
        `[batch, sequence, padded vocabulary]` on the last pipeline stage; None on the others.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    return _through_the_pipeline(trained, tokens, positions, None)


def _through_the_pipeline(
    trained: TrainedModel, tokens: Tensor, positions: Tensor, cache: RaggedCache | None
) -> Tensor | None:
    model, pipeline = trained.model, trained.groups.pp
    batch, length = tokens.shape
    if pipeline.rank() > 0:
        hidden = torch.empty(
            (length, batch, model.config.hidden_size),
            dtype=trained.args.params_dtype,
            device=tokens.device,
        )
        dist.recv(hidden, group=pipeline, group_src=pipeline.rank() - 1)
        model.set_input_tensor(hidden)
    output = trained.module(
        tokens, positions, None, inference_context=cache, runtime_gather_output=True
    )
    if pipeline.rank() == pipeline.size() - 1:
        return output
    dist.send(output.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
    return None
