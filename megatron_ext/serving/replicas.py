"""The copies of a model, on one rank or many, run pass by pass as the leader plans.

Rank 0 leads. Before each pass it tells all ranks what joins and leaves; afterwards it is told what
came of it. Data-parallel copies take different rows; copies that share experts pass together.
"""

import signal
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_ext.inference.engine import PROMPT_TOKENS, GenerationEngine
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.row import GenerationRow, ScoredText, TokenScore
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to make; see `GenerationRow` for its fields."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    likeliest: int = 0
    scores_prompt: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """What one token of a continuation makes certain.

    Attributes:
        text: that of `tokens`.
        finish: why the continuation ended, or None.
        tokens: those whose text is certain now, those of a scored prompt first.
    """

    text: str
    finish: str | None
    tokens: list[ScoredText] = field(default_factory=list)


@dataclass(frozen=True)
class PassPlan:
    """What happens in the next pass.

    Attributes:
        joining: number, copy and work of each new continuation.
        leaving: numbers of those given up.
        running: whether any copy has a row.
        last: whether to end after this one.
    """

    joining: list[tuple[int, int, GenerationRequest]] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    running: bool = False
    last: bool = False


class ModelReplicas:
    """This rank's part in running all copies of the model."""

    def __init__(
        self, trained: TrainedModel, max_slots: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        """Make room for rows in each copy; see `GenerationEngine`."""
        self.trained, self.max_slots = trained, max_slots
        groups = trained.groups
        self.count, self._copy = groups.dp.size(), groups.dp.rank()
        self._alone = dist.get_world_size() == 1
        self._shares_experts = groups.ep.size() > 1
        self._reports = groups.tp.rank() == 0 and groups.pp.rank() == 0
        self._engine = GenerationEngine(trained, max_slots, prompt_tokens)
        self._rows: dict[int, GenerationRow] = {}
        self._numbers: dict[GenerationRow, int] = {}

    def run(self, plan: PassPlan) -> list[tuple[int, TokenEvent]]:
        """Lead one pass; returns what each continuation got, of all copies."""
        if not self._alone:
            dist.broadcast_object_list([plan])  # all ranks: no narrower group holds every copy
        return self._run(plan)

    def follow(self) -> None:
        """Run what rank 0 plans until it says that it was the last; signals are its business."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        last = False
        while not last:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            self._run(told[0])
            last = told[0].last

    def _run(self, plan: PassPlan) -> list[tuple[int, TokenEvent]]:
        for number in plan.leaving:
            if number in self._rows:
                self._engine.drop(self._forget(number))
        for number, copy, work in plan.joining:
            if copy == self._copy:
                self._join(number, work)
        pieces = []
        if self._engine.rows:
            pieces = [self._piece(*event) for event in self._engine.step()]
        elif plan.running and self._shares_experts:
            self._engine.idle()
        if self._alone:
            return pieces
        gathered: list[Any] | None = (
            [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        )
        dist.gather_object(pieces if self._reports else [], gathered)
        return [piece for of_rank in gathered or [] for piece in of_rank]

    def _join(self, number: int, work: GenerationRequest) -> None:
        row = GenerationRow(
            self.trained,
            work.prompt,
            work.sampling,
            work.seed,
            work.likeliest,
            work.scores_prompt,
        )
        self._rows[number], self._numbers[row] = row, number
        self._engine.add(row)

    def _piece(self, row: GenerationRow, score: TokenScore, text: str) -> tuple[int, TokenEvent]:
        number, finish = self._numbers[row], row.completion.finish
        if finish is not None:
            self._forget(number)
        return number, TokenEvent(text, finish, row.released)

    def _forget(self, number: int) -> GenerationRow:
        row = self._rows.pop(number)
        del self._numbers[row]
        return row
