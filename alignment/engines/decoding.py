"""Sampling from a model of transformers, with the same random draws as the Megatron engine.

`generate` of transformers draws for all rows from one random state, and its ranks do not wait for
each other by default. Here the response in a row depends on its prompt and seed only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.engines.protocol import GeneratedResponse
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling, choose, log_probs_of


@torch.no_grad()
def decode(
    model: Any,
    eod: frozenset[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    device: torch.device | str,
) -> list[GeneratedResponse]:
    """Continue all prompts together. All ranks make the same number of forward passes.

    Args:
        model: Model in eval mode.
        eod: Tokens that end a response, if `sampling.stop_at_eod` is set.
        prompts: Token ids, at least one per row.
        sampling: Settings of sampling.
        seeds: One seed per prompt.
        device: Device of the model.

    Raises:
        UserError: A prompt is empty, or leaves no room.
    """
    longest = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < longest:
            raise UserError(f"A prompt has {len(prompt)} tokens. It must have 1 to {longest - 1}.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    responses = [GeneratedResponse([], [], False) for _ in prompts]
    unfinished = list(range(len(prompts)))
    tokens, mask = _aligned_right(prompts or [[0]])
    tokens, mask = tokens.to(device), mask.to(device)
    cache = None
    while _any_rank(bool(unfinished), device):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens = torch.zeros(len(mask), 1, dtype=torch.int64, device=device)
        if unfinished:
            logits = output.logits[unfinished, -1].float()
            chosen = choose(logits, sampling, [generators[row] for row in unfinished])
            scores = log_probs_of(logits / sampling.score_temperature, chosen).tolist()
            tokens[unfinished, 0] = chosen
            for row, token, score in zip(list(unfinished), chosen.tolist(), scores):
                responses[row].tokens.append(token)
                responses[row].log_probs.append(score)
                size = len(responses[row].tokens)
                if token in eod and sampling.stop_at_eod:
                    responses[row] = GeneratedResponse(
                        responses[row].tokens, responses[row].log_probs, True
                    )
                    unfinished.remove(row)
                elif size == sampling.max_new_tokens or size + len(prompts[row]) == longest:
                    unfinished.remove(row)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return responses


def _aligned_right(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens aligned to the right and their mask, int64 `[rows, longest]`."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


def _any_rank(flag: bool, device: torch.device | str) -> bool:
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total)
