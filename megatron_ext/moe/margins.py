"""How far a routing decision was from going the other way."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext.config import ETConfig, moe_layer_pattern
from megatron_ext.errors import UserError
from megatron_ext.moe.router import ThresholdRouter, TokenChoiceRouter


def routing_margins(router: ThresholdRouter | TokenChoiceRouter, logits: Tensor) -> Tensor:
    """What separates each pair of token and expert from its limit; above 0 where selected.

    Thresholds: the logit minus the expert's threshold. Token choice: the score minus the k-th
    largest of the other experts' scores, a score being what the router compares: the logit, or its
    sigmoid and the like plus the balancing bias. Only in a tie is a margin of 0 selected.

    Args:
        router: in evaluation mode.
        logits: `[..., experts]`, as `router.gating` gives them.

    Returns:
        fp32 `[tokens, experts]`.
    """
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if isinstance(router, ThresholdRouter):
        return logits - router.thresholds.value()
    scores = _compared_scores(router, logits)
    k, experts = router.topk, scores.shape[-1]
    if k == experts:
        return torch.full_like(scores, torch.inf)
    best = scores.topk(k + 1, dim=-1).values
    last, first_out = best[:, -2:-1], best[:, -1:]
    # Without a selected expert, the first one that was left out is the k-th of the others.
    return scores - torch.where(scores >= last, first_out, last)


def refuse_without_margins(config: TransformerConfig) -> None:
    """Raise for models that have no experts, or whose router compares more than scores.

    Raises:
        UserError: says which.
    """
    assert isinstance(config, ETConfig)
    if not any(moe_layer_pattern(config)):
        raise UserError("the model is dense: it has no experts whose routing could be inspected")
    for name in ("moe_router_group_topk", "moe_expert_capacity_factor"):
        if not config.uses_thresholds and getattr(config, name, None):
            raise UserError(
                f"the model was trained with --{name.replace('_', '-')}: its routing depends on "
                "more than a token's scores, so there is no margin to show"
            )


def _compared_scores(router: TokenChoiceRouter, logits: Tensor) -> Tensor:
    if router.routing_type == "quantile_balancing":
        return logits - router.qb_beta
    if router.routing_type == "sinkhorn" or router.score_function == "softmax":
        return logits  # in the same order as their softmax
    if router.score_function == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        assert router.score_function == "sqrtsoftplus"
        scores = torch.nn.functional.softplus(logits).sqrt()
    return scores if router.expert_bias is None else scores + router.expert_bias.float()
