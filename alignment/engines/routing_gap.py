"""Comparison of the routing of generation with that of training, on the same responses.

Generation runs a prompt and then one token at a time, with a cache. Training runs rows that are
packed with samples. If an expert's choice depends on the other tokens of a batch, the two route one
response differently, and the policy that is trained is not the one that was sampled. If it depends
on the token alone, only rounding can separate them, and only for decisions close to a threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.log_probs import TokenScorer
from megatron_ext.inference.cache import TokenChunk
from megatron_ext.inference.engine import GenerationEngine
from megatron_ext.inference.generation import passes
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.row import GenerationRow, TokenScore
from megatron_ext.inference.sampling import Sampling
from megatron_ext.moe.order_statistics import kth_largest
from megatron_ext.moe.record_routing import record_routing
from megatron_ext.moe.router import ETRouter, routers_of

QUANTILES = {"0.1%": 0.001, "1%": 0.01, "10%": 0.1, "50%": 0.5}
_PLACE, _LOG_PROB = "place", "decoded_log_probs"
_MAX_TOKENS = 1 << 24  # fp32 represents integers up to this exactly


@dataclass(frozen=True)
class DecodedRouting:
    """Routing of some samples in generation, on this rank's pipeline stage.

    Attributes:
        logits: Router logits by layer number, fp32 `[tokens, experts]`, of every token that
            generation runs: all but the last of each sample, sample after sample.
        maps: Whether an expert takes a token, bool `[tokens, experts]`, likewise.
        log_probs: Log-probabilities of the tokens of each sample's response, nats.
        tokens: Number of tokens.
    """

    logits: Mapping[int, Tensor]
    maps: Mapping[int, Tensor]
    log_probs: Sequence[Sequence[float]]
    tokens: int


class _ForcedRow(GenerationRow):
    """Row of generation with a fixed continuation, so that nothing is sampled."""

    def __init__(self, trained: TrainedModel, sample: TokenSample, temperature: float) -> None:
        prompt_tokens, new = sample.tokens[: sample.prompt], len(sample.tokens) - sample.prompt
        super().__init__(
            trained, prompt_tokens, Sampling(new, score_temperature=temperature), seed=0
        )
        self.prompt, self._prompt_length = list(sample.tokens), sample.prompt

    @property
    def generates(self) -> bool:
        return self.cached >= self._prompt_length

    def chunk(self, slot: int, max_prompt_tokens: int) -> TokenChunk:
        end = (
            self.cached + 1
            if self.generates
            else min(self.cached + max_prompt_tokens, self._prompt_length)
        )
        return TokenChunk(
            slot, self.cached, self.prompt[self.cached : end], int(end >= self._prompt_length)
        )

    def add(self, score: TokenScore) -> str:
        self.completion.tokens.append(score.token)
        self.completion.log_probs.append(score.log_prob)
        if self._prompt_length + len(self.completion.tokens) == len(self.prompt):
            self.completion.finish = "length"
        return ""


@torch.no_grad()
def decode(
    trained: TrainedModel, samples: Sequence[TokenSample], temperature: float
) -> DecodedRouting:
    """Run existing responses through the model in the same way as generation.

    Args:
        trained: Model. This is a collective of all its ranks.
        samples: Samples of this copy of the model, each with a response.
        temperature: Divisor of the logits before log-probabilities.
    """
    rows = [_ForcedRow(trained, sample, temperature) for sample in samples]
    engine = GenerationEngine(trained, max_slots=len(rows))
    begins: dict[GenerationRow, int] = {}
    tokens = 0
    for row in rows:
        engine.add(row)
        begins[row] = tokens
        tokens += len(row.prompt) - 1
    logits: dict[int, Tensor] = {}
    maps: dict[int, Tensor] = {}

    def record(router: ETRouter, values: Tensor, chosen: Tensor) -> None:
        places = [
            begins[engine.rows[chunk.slot]] + position
            for chunk in engine.chunks
            for position in range(chunk.start, chunk.end)
        ]
        if places:
            layer, shape = router.layer_number, (tokens, values.shape[1])
            logits.setdefault(layer, torch.empty(shape))[places] = values.cpu()
            maps.setdefault(layer, torch.empty(shape, dtype=torch.bool))[places] = chosen.cpu()

    with record_routing(routers_of([trained.module]), record):
        for _ in passes(engine):
            pass
    return DecodedRouting(logits, maps, [row.completion.log_probs for row in rows], tokens)


def mark_samples(samples: Sequence[TokenSample], decoded: DecodedRouting) -> list[TokenSample]:
    """Return the samples with each token's index and log-probability in generation.

    Indices count from 1. The last token of a sample, which generation does not run, has index 0.
    """
    assert decoded.tokens < _MAX_TOKENS
    marked, begin = [], 1
    for sample, log_probs in zip(samples, decoded.log_probs):
        last = begin + len(sample.tokens) - 1
        places: list[float] = [*range(begin, last), 0]
        extras = {_PLACE: places, _LOG_PROB: [*[0.0] * sample.prompt, *log_probs]}
        marked.append(replace(sample, extras=extras))
        begin = last
    return marked


class RoutingComparison:
    """Comparison of the routing in training with that in generation.

    Every rank compares the decisions on its tokens in the layers of its stage. Each decision counts
    once.
    """

    def __init__(
        self, decoded: DecodedRouting, parts: Sequence[TokenBatch], groups: ProcessGroupCollection
    ):
        """Create a comparison.

        Args:
            decoded: Routing in generation.
            parts: Micro-batches of marked samples, in the order in which they will run.
            groups: Process groups whose ranks share rows (cp), a row's tokens (tp) and layers (pp).
        """
        self.decoded, self.groups = decoded, groups
        self._places = [_places(part, groups) for part in parts]
        self._runs: dict[int, int] = {}
        self._flipped = torch.zeros(decoded.tokens + 1, dtype=torch.int32)
        self._counts = torch.zeros(3, dtype=torch.int64)  # decisions, flips, selected in either
        self._gap = 0.0
        self._margins = [torch.empty(0)]

    def record(self, router: ETRouter, logits: Tensor, maps: Tensor) -> None:
        """Compare one layer's decisions on the next micro-batch; for `record_routing`."""
        layer = router.layer_number
        run = self._runs.setdefault(layer, 0)
        self._runs[layer] += 1
        places = self._places[run]
        is_recorded = places > 0
        if not is_recorded.any():
            return
        indices = places[is_recorded] - 1
        margins = router.margins(logits).cpu()[is_recorded]
        logits, maps = logits.cpu()[is_recorded], maps.cpu()[is_recorded]
        other_logits, other_maps = (
            self.decoded.logits[layer][indices],
            self.decoded.maps[layer][indices],
        )
        flips = maps != other_maps
        self._flipped[indices] |= flips.any(dim=1)
        sums = [maps.numel(), int(flips.sum()), int((maps | other_maps).sum())]
        self._counts += torch.tensor(sums)
        self._gap = max(self._gap, float((logits - other_logits).abs().max()))
        self._margins.append(margins.abs().flatten())

    def metrics(self, batch: TokenBatch, log_probs: Tensor) -> dict[str, float]:
        """Return the metrics, the same on every rank; a collective.

        Args:
            batch: Whole batch of the marked samples.
            log_probs: Log-probabilities of its tokens in training, `[rows, length]`.
        """
        groups, device = self.groups, torch.cuda.current_device()
        flipped = self._flipped.to(device)
        dist.all_reduce(flipped, op=dist.ReduceOp.MAX, group=groups.pp)
        reports = groups.pp.rank() == 0  # a token is on all stages, each of its layers on one
        local_tokens = sum(int((places > 0).sum()) for places in self._places)
        tokens = [int(flipped.sum()) * reports, local_tokens * reports]
        reports &= groups.tp.rank() == 0 and groups.cp.rank() == 0
        gaps = (log_probs.cpu() - batch.extras[_LOG_PROB])[batch.loss_mask].abs().double()
        counts = torch.tensor([*self._counts.tolist(), *tokens, len(gaps) * reports], device=device)
        total = torch.tensor(float(gaps.sum()) * reports, dtype=torch.float64, device=device)
        largest = torch.tensor([self._gap, float(gaps.max()) if len(gaps) else 0.0], device=device)
        dist.all_reduce(counts)
        dist.all_reduce(total)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        decisions, flips, selected, moved, all_tokens, scored = counts.tolist()
        if not decisions:
            return {}
        logit_gap, log_prob_gap = largest.tolist()
        return {
            "routing/decisions": decisions,
            "routing/flip_rate": flips / decisions,
            "routing/flip_rate_selected": flips / max(selected, 1),
            "routing/tokens_flipped": moved / all_tokens,
            "routing/logit_gap_max": logit_gap,
            "routing/log_prob_gap": float(total) / max(scored, 1),
            "routing/log_prob_gap_max": log_prob_gap,
            **self._quantiles(device),
        }

    def _quantiles(self, device: torch.device | int) -> dict[str, float]:
        """Return quantiles of |margin| over all decisions."""
        margins = torch.cat(self._margins).to(device).unsqueeze(1)
        ranks = [lambda n, q=q: n - max(0, -int(-q * n // 1) - 1) for q in QUANTILES.values()]
        quantiles = kth_largest([margins] * len(ranks), ranks, dist.group.WORLD).value.tolist()
        return {f"routing/margin_{name}": value for name, value in zip(QUANTILES, quantiles)}


def _places(part: TokenBatch, groups: ProcessGroupCollection) -> Tensor:
    """Return the indices of the tokens that this rank's routers receive, in their order."""
    places = part.extras[_PLACE][:, TokenScorer(part, groups).places].T  # [length, rows]
    return places.chunk(groups.tp.size())[groups.tp.rank()].flatten().long().cpu()
