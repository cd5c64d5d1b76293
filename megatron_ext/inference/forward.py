"""One forward pass of a trained model, through all stages of its pipeline."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import log_probs_of

# Places whose logits are made in one go: bounds their memory at any vocabulary.
_HEAD_TOKENS = 1024


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


@torch.no_grad()
def target_log_probs(
    trained: TrainedModel,
    tokens: Tensor,
    places: Tensor,
    targets: Tensor,
    padding_mask: Tensor | None = None,
) -> Tensor | None:
    """Log-probabilities of given tokens. The output head runs where they are wanted alone.

    Args:
        tokens: int64 `[batch, sequence]`.
        places: int64 `[n]`, of the tokens before the targets, in `tokens.flatten()`.
        targets: int64 `[n]`.
        padding_mask: bool `[batch, sequence]`, True where the router should pass a token over.

    Returns:
        fp32 `[2, n]` on the last pipeline stage, None on the others: log-probabilities in nats, and
        1 where the target is the likeliest token.
    """

    def score(
        hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
    ) -> Tensor:
        hidden = hidden_states.transpose(0, 1).flatten(0, 1)[places]  # [n, hidden]
        scores = [hidden.new_empty(2, 0, dtype=torch.float32)]
        for part, wanted in zip(hidden.split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS)):
            if not len(wanted):
                continue
            logits, _ = output_layer(
                part.unsqueeze(1), weight=output_weight, runtime_gather_output=True
            )
            logits = scale_logits(logits).squeeze(1)  # [n, padded vocabulary]
            likeliest = logits.argmax(dim=-1) == wanted
            scores.append(torch.stack([log_probs_of(logits, wanted), likeliest.float()]))
        return torch.cat(scores, dim=1)

    return _through_the_pipeline(
        trained, tokens, None, padding_mask=padding_mask, output_processor=score
    )


def _through_the_pipeline(
    trained: TrainedModel,
    tokens: Tensor,
    context: StaticInferenceContext | None,
    **options: Any,
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
        tokens,
        positions,
        None,
        inference_context=context,
        runtime_gather_output=True,
        **options,
    )
    if pipeline.rank() == pipeline.size() - 1:
        return output
    dist.send(output.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
    return None
