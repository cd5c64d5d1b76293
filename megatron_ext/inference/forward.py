"""Forward passes of a trained model through all stages of its pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_ext.inference.cache import RaggedCache, TokenChunk
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import log_probs_of

# Number of positions whose logits are computed together, which bounds memory.
_HEAD_TOKENS = 1024


@torch.no_grad()
def next_logits(
    trained: TrainedModel, cache: RaggedCache, chunks: Sequence[TokenChunk]
) -> Tensor | None:
    """Run the next tokens of some rows and add them to the cache.

    Args:
        trained: The model.
        cache: Cache of this pipeline stage.
        chunks: At least one chunk; chunks of one token come first.

    Returns:
        Logits of the scored tokens of all chunks, `[scored, padded vocabulary]`, on the last
        pipeline stage; None on the others.
    """
    tokens = cache.lay_out(chunks, torch.cuda.current_device())
    with InferenceMode.active():  # computes only the logits of scored tokens
        logits = _through_the_pipeline(trained, tokens, cache.positions, cache)
    return None if logits is None else logits[0]


@torch.no_grad()
def full_logits(trained: TrainedModel, tokens: Tensor) -> Tensor | None:
    """Compute the logits after every token, without a cache.

    Args:
        trained: The model.
        tokens: Token ids, int64 `[batch, sequence]`.

    Returns:
        Logits, `[batch, sequence, padded vocabulary]`, on the last pipeline stage; None on the
        others.
    """
    return _through_the_pipeline(trained, tokens, _from_the_start(tokens), None)


@torch.no_grad()
def target_log_probs(
    trained: TrainedModel,
    tokens: Tensor,
    places: Tensor,
    targets: Tensor,
    padding_mask: Tensor | None = None,
) -> Tensor | None:
    """Compute the log-probabilities of target tokens. The output head runs at their positions only.

    Args:
        trained: The model.
        tokens: Token ids, int64 `[batch, sequence]`.
        places: Positions of the tokens before the targets in `tokens.flatten()`, int64 `[n]`.
        targets: Target tokens, int64 `[n]`.
        padding_mask: Mask, bool `[batch, sequence]`, True for tokens that the router skips.

    Returns:
        fp32 `[2, n]` on the last pipeline stage, None on the others: log-probabilities in nats, and
        1 where the target is the most likely token.
    """

    def score(
        hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
    ) -> Tensor:
        hidden = hidden_states.transpose(0, 1).flatten(0, 1)[places]  # [n, hidden]
        scores = [hidden.new_empty(2, 0, dtype=torch.float32)]
        for part, labels in zip(hidden.split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS)):
            if not len(labels):
                continue
            logits, _ = output_layer(
                part.unsqueeze(1), weight=output_weight, runtime_gather_output=True
            )
            logits = scale_logits(logits).squeeze(1)  # [n, padded vocabulary]
            likeliest = logits.argmax(dim=-1) == labels
            scores.append(torch.stack([log_probs_of(logits, labels), likeliest.float()]))
        return torch.cat(scores, dim=1)

    return _through_the_pipeline(
        trained,
        tokens,
        _from_the_start(tokens),
        None,
        padding_mask=padding_mask,
        output_processor=score,
    )


def _from_the_start(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def _through_the_pipeline(
    trained: TrainedModel,
    tokens: Tensor,
    positions: Tensor,
    cache: RaggedCache | None,
    **options: Any,
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
        tokens,
        positions,
        None,
        inference_context=cache,
        runtime_gather_output=True,
        **options,
    )
    if pipeline.rank() == pipeline.size() - 1:
        return output
    dist.send(output.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
    return None
