"""Expert layers of variable fan-out, in torch alone.

Two functions compute the same sum. :func:`loop_over_experts` is the reference and the faster one on
CPUs. :func:`grouped_experts` never waits for the device: its shapes do not depend on the routing.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.hf.remote.modeling_et import GATES

Product = Callable[[Tensor], Tensor]
"""Projection of rows `[rows, inputs]` to `[rows, outputs]`."""


def activate(inner: Tensor, gated: bool) -> Tensor:
    """Return SwiGLU of `[gate, up]` halves if `gated`, else the squared ReLU."""
    if not gated:
        return F.relu(inner).square()
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(tokens: Tensor, router: Tensor, thresholds: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token.

    Args:
        tokens: Hidden states, `[tokens, hidden]`.
        router: Weight of the router, `[experts, hidden]`.
        thresholds: Threshold of each expert, fp32 `[experts]`.
        gate: Name of the function from logits to weights, as in the model's configuration.

    Returns:
        Weights, fp32, and the routing map, bool, both `[tokens, experts]`.
    """
    logits = F.linear(tokens.float(), router.float())
    return GATES[gate](logits), logits > thresholds


def loop_over_experts(
    tokens: Tensor,
    weights: Tensor,
    routing_map: Tensor,
    up: Sequence[Product],
    down: Sequence[Product],
    gated: bool,
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, one expert after the other.

    Args:
        tokens: Hidden states, `[tokens, hidden]`.
        weights: Weights, fp32 `[tokens, experts]`.
        routing_map: Whether a token is sent to an expert, bool `[tokens, experts]`.
        up: First projection of each expert, to `inner`; with `gated` to `2 * inner`, the gate's
            half first.
        down: Second projection of each expert, from `inner`.
        gated: Whether the experts are SwiGLU and not squared ReLU.

    Returns:
        `[tokens, hidden]`, in the data type of `tokens`.
    """
    expert_of_row, token_of_row = routing_map.t().nonzero(as_tuple=True)
    output = torch.zeros_like(tokens)
    if not len(token_of_row):
        return output
    counts = [(expert, n) for expert, n in enumerate(routing_map.sum(0).tolist()) if n]

    def project(rows: Tensor, products: Sequence[Product]) -> Tensor:
        parts = rows.split([n for _, n in counts])
        return torch.cat([products[expert](part) for (expert, _), part in zip(counts, parts)])

    inner = activate(project(tokens[token_of_row], up), gated)
    inner = inner * weights[token_of_row, expert_of_row, None].to(inner.dtype)
    return output.index_add_(0, token_of_row, project(inner, down))


def buffer_rows(tokens: int, experts: int, max_fan_out: int) -> int:
    """Return for how many pairs of token and expert a batch has space.

    Args:
        tokens: Number of tokens of the batch.
        experts: Number of experts.
        max_fan_out: Largest mean fan-out of a batch. There is space for one more token of every
            expert, as the mean of a few tokens varies most.
    """
    return min(tokens * experts, tokens * max_fan_out + experts)


def grouped_experts(
    tokens: Tensor,
    weights: Tensor,
    routing_map: Tensor,
    up: Tensor,
    down: Tensor,
    gated: bool,
    rows: int,
) -> Tensor:
    """Return the sum of :func:`loop_over_experts` by two grouped matrix products.

    The chosen pairs of expert and token are moved to the front of a buffer, sorted by expert. The
    products skip the rows behind them.

    Args:
        tokens: Hidden states, `[tokens, hidden]`.
        weights: Weights, fp32 `[tokens, experts]`.
        routing_map: Whether a token is sent to an expert, bool `[tokens, experts]`.
        up: First projections, `[experts, inner, hidden]`; with `gated` the gates come first.
        down: Second projections, `[experts, hidden, inner]`.
        gated: Whether the experts are SwiGLU and not squared ReLU.
        rows: Number of rows of the buffer; see :func:`buffer_rows`.

    Returns:
        `[tokens, hidden]`, in the data type of `tokens`.

    Raises:
        RuntimeError: More pairs were chosen. On a GPU the error is raised by the device, later.
    """
    by_expert = routing_map.t()
    ends = by_expert.sum(1).cumsum(0)  # [experts], end of each expert's rows
    torch._assert_async(
        ends[-1] <= rows,
        "a batch was routed to more experts than the model's max_fan_out allows: raise it in "
        "config.json",
    )
    token_of_row, weight_of_row = _compact(by_expert, weights.t(), rows)
    ends = ends.to(torch.int32)
    inner = activate(F.grouped_mm(tokens[token_of_row], up.transpose(1, 2), offs=ends), gated)
    inner = inner * weight_of_row.unsqueeze(1).to(inner.dtype)
    results = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    # Rows that belong to no expert have not been written by the products.
    used = torch.arange(rows, device=tokens.device) < ends[-1]
    results = results.masked_fill(~used.unsqueeze(1), 0)
    return torch.zeros_like(tokens).index_add_(0, token_of_row, results)


def _compact(by_expert: Tensor, weights: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the token, int64, and the weight, fp32, of each row, both `[rows]`, zero at the end.

    Args:
        by_expert: The routing map, bool `[experts, tokens]`.
        weights: Weights, fp32 `[experts, tokens]`.
        rows: Number of rows, which all pairs fit into.
    """
    chosen = by_expert.flatten()
    # Pairs that were not chosen are written to one more row, which is cut off.
    row = torch.where(chosen, chosen.cumsum(0) - 1, rows).clamp_(max=rows)
    pair = torch.arange(chosen.numel(), device=chosen.device)
    token_of_row = pair.new_zeros(rows + 1).scatter_(0, row, pair % by_expert.shape[1])
    weight_of_row = weights.new_zeros(rows + 1).scatter_(0, row, weights.flatten())
    return token_of_row[:-1], weight_of_row[:-1]
