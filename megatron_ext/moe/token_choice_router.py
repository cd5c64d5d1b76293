"""Megatron's top-k router, for comparison."""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.moe.router import ETRouter


class TokenChoiceRouter(TopKRouter, ETRouter):
    """Megatron's top-k router, counted like the others.

    Two bugs of megatron-core 0.19.2 in loss-free balancing are fixed, so that it is a fair
    baseline: padding was refused for a missing dimension, and in bf16 the counts were rounded, so
    that the bias could move the wrong way.
    """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route by the top k logits of each token; see TopKRouter.routing."""
        probs, routing_map = TopKRouter.routing(self, logits, padding_mask)
        self.count(routing_map, padding_mask)
        return probs, routing_map

    def margins(self, logits: Tensor) -> Tensor:
        """Return the score minus the k-th largest of the other experts' scores.

        A score is what the router compares: the logit, or its sigmoid and the like plus the
        balancing bias. An expert whose margin is 0 may be selected too, in a tie.
        """
        scores = self._compared_scores(logits)
        k, experts = self.topk, scores.shape[-1]
        if k == experts:
            return torch.full_like(scores, torch.inf)
        best = scores.topk(k + 1, dim=-1).values
        last, first_out = best[:, -2:-1], best[:, -1:]
        # Without a selected expert, the first one that was left out is the k-th of the others.
        return scores - torch.where(scores >= last, first_out, last)

    def _compared_scores(self, logits: Tensor) -> Tensor:
        """Return the values `[tokens, experts]` whose order decides."""
        if self.routing_type == "quantile_balancing":
            return logits - self.qb_beta
        if self.routing_type == "sinkhorn" or self.score_function == "softmax":
            return logits  # in the same order as their softmax
        if self.score_function == "sigmoid":
            scores = torch.sigmoid(logits)
        else:
            assert self.score_function == "sqrtsoftplus"
            scores = torch.nn.functional.softplus(logits).sqrt()
        return scores if self.expert_bias is None else scores + self.expert_bias.float()

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        super()._apply_expert_bias(routing_map)

    def _maintain_float32_expert_bias(self) -> None:
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.float()
