"""Engine of continuous batching: rows join and leave between forward passes.

A pass processes the last token of every row whose prompt is finished, and as many prompt tokens of
the other rows as fit in a budget. Rows share only matrix products, so that the logits of a row are
the same as without other rows, up to the rounding of products with another number of rows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.inference.cache import RaggedCache, TokenChunk
from megatron_ext.inference.forward import full_logits, next_logits
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.row import GenerationRow, TokenScore
from megatron_ext.inference.sampling import adjust, choose, log_probs_of

PROMPT_TOKENS = 512
"""Maximum number of prompt tokens in a pass, which bounds how long a prompt delays other rows."""


class GenerationEngine:
    """Engine that generates the rows of one replica of the model.

    The ranks of a replica (tensor and pipeline parallel) must make the same calls, and they get the
    same tokens.
    """

    def __init__(
        self, trained: TrainedModel, max_slots: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        """Create an engine without rows.

        Args:
            trained: The model.
            max_slots: Maximum number of rows at a time.
            prompt_tokens: Maximum number of prompt tokens in a pass.
        """
        self.trained, self.prompt_tokens = trained, prompt_tokens
        self.max_slots = max_slots
        self.rows: list[GenerationRow] = []  # by their slot in the cache
        self.chunks: list[TokenChunk] = []  # of the present pass, in the order of its tokens
        self._cache = RaggedCache(max_slots, trained.max_length)
        self._arrivals: list[int] = []  # numbers of the same rows, in order of arrival
        self._count = itertools.count()

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.max_slots - len(self.rows)

    def add(self, row: GenerationRow) -> None:
        """Add a row, which takes part from the next pass on."""
        assert self.free
        self.rows.append(row)
        self._arrivals.append(next(self._count))

    def drop(self, row: GenerationRow) -> None:
        """Remove a row and move the row of the last slot into its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot < last:
            if self.rows[last].cached:
                self._cache.move(last, slot)
            self.rows[slot], self._arrivals[slot] = self.rows[last], self._arrivals[last]
        self.rows.pop()
        self._arrivals.pop()

    def step(self) -> list[tuple[GenerationRow, TokenScore, str]]:
        """Run one pass.

        Returns:
            Each row that got a token, with the token's score and the text that has become certain.
            A row whose completion has a finish reason has left the engine.
        """
        self.chunks = chunks = self._plan()
        scores = iter(self._scored(next_logits(self.trained, self._cache, chunks), chunks))
        events = []
        for chunk in chunks:
            row = self.rows[chunk.slot]
            row.cached = chunk.end
            new_scores = [next(scores) for _ in range(chunk.scored)]
            if not row.generates:
                row.prompt_scores += new_scores
                continue
            row.prompt_scores += new_scores[:-1]
            events.append((row, new_scores[-1], row.add(new_scores[-1])))
        for row, _, _ in events:
            if row.completion.finish is not None:
                self.drop(row)
        return events

    def idle(self) -> None:
        """Take part in a pass of replicas that share experts with this one, without a row."""
        self.chunks = []
        device = torch.cuda.current_device()
        full_logits(self.trained, torch.zeros(1, 1, dtype=torch.int64, device=device))

    def _plan(self) -> list[TokenChunk]:
        chunks, left = [], self.prompt_tokens
        by_arrival = sorted(range(len(self.rows)), key=self._arrivals.__getitem__)
        for slot in by_arrival:
            row = self.rows[slot]
            if not row.generates and left == 0:
                continue
            chunk = row.chunk(slot, left)
            if not row.generates:
                left -= len(chunk.tokens)
            chunks.append(chunk)
        return sorted(chunks, key=lambda c: (len(c.tokens) > 1, c.slot))

    def _scored(self, logits: Tensor | None, chunks: Sequence[TokenChunk]) -> list[TokenScore]:
        """Return the scores of prompt tokens, and of new tokens at the ends of prompts.

        The last pipeline stage samples the new tokens and broadcasts them.
        """
        # A row and its prompt token to score, or None for a new token.
        positions: list[tuple[GenerationRow, int | None]] = []
        for chunk in chunks:
            row = self.rows[chunk.slot]
            for position in range(chunk.end - chunk.scored + 1, chunk.end + 1):
                token = row.prompt[position] if position < len(row.prompt) else None
                positions.append((row, token))
        if not positions:
            return []
        top_count = max(row.likeliest for row, _ in positions)
        # Token ids are exact in fp64, so one message carries all.
        packed = torch.empty(
            2 + 2 * top_count,
            len(positions),
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        if logits is not None:
            rows = getattr(self.trained.args, "hf_vocab_size", None) or self.trained.vocab_size
            self._fill(packed, logits[:, :rows].float(), positions, top_count)
        pipeline = self.trained.groups.pp
        if pipeline.size() > 1:
            dist.broadcast(packed, group=pipeline, group_src=pipeline.size() - 1)
        columns: list[Any] = packed.T.tolist()
        return [
            TokenScore(int(column[0]), column[1], _pairs(column[2:], row.likeliest))
            for column, (row, _) in zip(columns, positions, strict=True)
        ]

    def _fill(
        self,
        packed: Tensor,
        logits: Tensor,
        positions: list[tuple[GenerationRow, int | None]],
        top_count: int,
    ) -> None:
        # Rows of the model beyond the tokenizer have a probability, but are never chosen.
        vocab_logits = logits[:, : self.trained.vocab_size]
        tokens = torch.tensor([token or 0 for _, token in positions], device=logits.device)
        by_distribution: dict[Any, list[int]] = {}
        for number, (row, token) in enumerate(positions):
            if token is None:
                by_distribution.setdefault(row.sampling.distribution, []).append(number)
        for numbers in by_distribution.values():
            rows = [positions[number][0] for number in numbers]
            selected = vocab_logits if len(numbers) == len(positions) else vocab_logits[numbers]
            if any(row.sampling.depends_on_tokens for row in rows):
                selected = torch.stack([_adjusted(*pair) for pair in zip(selected, rows)])
            tokens[numbers] = choose(selected, rows[0].sampling, [row.generator for row in rows])
        scales = [row.sampling.score_temperature for row, _ in positions]
        if any(scale != 1 for scale in scales):
            logits = logits / torch.tensor(scales, device=logits.device).unsqueeze(1)
        packed[0], packed[1] = tokens, log_probs_of(logits, tokens)
        if top_count:
            values, ids = logits[:, : vocab_logits.shape[1]].topk(
                top_count
            )  # [positions, top_count]
            packed[2::2] = ids.T
            packed[3::2] = (values - logits.logsumexp(-1, keepdim=True)).T


def _adjusted(logits: Tensor, row: GenerationRow) -> Tensor:
    if not row.sampling.depends_on_tokens:
        return logits
    return adjust(logits, row.sampling, row.prompt, row.completion.tokens, row.ends)


def _pairs(flat: list[float], count: int) -> tuple[tuple[int, float], ...]:
    return tuple((int(flat[2 * i]), flat[2 * i + 1]) for i in range(count))
