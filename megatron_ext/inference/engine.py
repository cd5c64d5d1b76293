"""Continuous batching: rows join and leave between forward passes.

A pass takes the last token of every row that is past its prompt, and as much as fits in a budget
of the prompts of the others. Its rows share matrix products and nothing else, so a row's logits
are those it has alone, up to the rounding of a product with another number of rows.
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
"""The most prompt tokens of a pass: a long prompt delays the next token of other rows by so many at
a time."""


class GenerationEngine:
    """The rows of one copy of the model.

    The ranks of a copy (tensor and pipeline parallel) must make the same calls; they get the same
    tokens.
    """

    def __init__(
        self, trained: TrainedModel, max_slots: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        """Make room for rows.

        Args:
            max_slots: the most rows at a time.
            prompt_tokens: see `PROMPT_TOKENS`.
        """
        self.trained, self.prompt_tokens = trained, prompt_tokens
        self.max_slots = max_slots
        self.rows: list[GenerationRow] = []  # by their slot in the cache
        self.chunks: list[TokenChunk] = []  # of the present pass, in the order of its tokens
        self._cache = RaggedCache(max_slots, trained.max_length)
        self._arrivals: list[int] = []  # of the same rows
        self._count = itertools.count()

    @property
    def free(self) -> int:
        """How many rows can be added."""
        return self.max_slots - len(self.rows)

    def add(self, row: GenerationRow) -> None:
        """Let a new row take part from the next pass on."""
        assert self.free
        self.rows.append(row)
        self._arrivals.append(next(self._count))

    def drop(self, row: GenerationRow) -> None:
        """Give up a row; the last slot moves into the gap."""
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
            each row that got a token, with its score and the text that can be shown since the
            last; a row whose completion has a finish has left the engine.
        """
        self.chunks = chunks = self._plan()
        scores = iter(self._scored(next_logits(self.trained, self._cache, chunks), chunks))
        events = []
        for chunk in chunks:
            row = self.rows[chunk.slot]
            row.cached = chunk.end
            got = [next(scores) for _ in range(chunk.wanted)]
            if not row.generates:
                row.prompt_scores += got
                continue
            row.prompt_scores += got[:-1]
            events.append((row, got[-1], row.add(got[-1])))
        for row, _, _ in events:
            if row.completion.finish is not None:
                self.drop(row)
        return events

    def idle(self) -> None:
        """Take part in a pass of copies that share experts with this one, without a row."""
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
        """Scores of what the chunks want: prompt tokens, and a choice where the prompt ends.

        The last pipeline stage chooses and tells the others.
        """
        wanted: list[
            tuple[GenerationRow, int | None]
        ] = []  # a row, and the token that is there already
        for chunk in chunks:
            row = self.rows[chunk.slot]
            for position in range(chunk.end - chunk.wanted + 1, chunk.end + 1):
                given = row.prompt[position] if position < len(row.prompt) else None
                wanted.append((row, given))
        if not wanted:
            return []
        most = max(row.likeliest for row, _ in wanted)
        # Token ids are exact in fp64, so one message carries all.
        packed = torch.empty(
            2 + 2 * most, len(wanted), dtype=torch.float64, device=torch.cuda.current_device()
        )
        if logits is not None:
            self._fill(packed, logits[:, : self.trained.vocab_size].float(), wanted, most)
        pipeline = self.trained.groups.pp
        if pipeline.size() > 1:
            dist.broadcast(packed, group=pipeline, group_src=pipeline.size() - 1)
        columns: list[Any] = packed.T.tolist()
        return [
            TokenScore(int(column[0]), column[1], _pairs(column[2:], row.likeliest))
            for column, (row, _) in zip(columns, wanted, strict=True)
        ]

    def _fill(
        self,
        packed: Tensor,
        logits: Tensor,
        wanted: list[tuple[GenerationRow, int | None]],
        most: int,
    ) -> None:
        tokens = torch.tensor([given or 0 for _, given in wanted], device=logits.device)
        alike: dict[Any, list[int]] = {}
        for number, (row, given) in enumerate(wanted):
            if given is None:
                alike.setdefault(row.sampling.distribution, []).append(number)
        for numbers in alike.values():
            rows = [wanted[number][0] for number in numbers]
            theirs = logits if len(numbers) == len(wanted) else logits[numbers]
            if any(row.sampling.depends_on_tokens for row in rows):
                theirs = torch.stack([_adjusted(*pair) for pair in zip(theirs, rows)])
            tokens[numbers] = choose(theirs, rows[0].sampling, [row.generator for row in rows])
        scales = [row.sampling.score_temperature for row, _ in wanted]
        if any(scale != 1 for scale in scales):
            logits = logits / torch.tensor(scales, device=logits.device).unsqueeze(1)
        packed[0], packed[1] = tokens, log_probs_of(logits, tokens)
        if most:
            values, ids = logits.topk(most)  # [wanted, most]
            packed[2::2] = ids.T
            packed[3::2] = (values - logits.logsumexp(-1, keepdim=True)).T


def _adjusted(logits: Tensor, row: GenerationRow) -> Tensor:
    if not row.sampling.depends_on_tokens:
        return logits
    return adjust(logits, row.sampling, row.prompt, row.completion.tokens, row.ends)


def _pairs(flat: list[float], count: int) -> tuple[tuple[int, float], ...]:
    return tuple((int(flat[2 * i]), flat[2 * i + 1]) for i in range(count))
