"""Replicas of a model on one or several ranks, run pass by pass under the control of rank 0.

Before each forward pass rank 0 broadcasts which continuations join and leave the batch. After it,
rank 0 gathers the resulting token events. Data-parallel replicas generate different continuations,
and replicas that share experts run their passes together.
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
    """Continuation to generate.

    Attributes:
        prompt: Token ids of the prompt.
        sampling: Sampling settings.
        seed: Seed of the sampling.
        likeliest: Number of most likely tokens that each score lists.
        scores_prompt: Whether the tokens of the prompt are scored, too.
    """

    prompt: list[int]
    sampling: Sampling
    seed: int
    likeliest: int = 0
    scores_prompt: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """Event of a new token: the text that has become certain.

    Attributes:
        text: Text of `tokens`.
        finish: Reason for the end of the continuation, or None.
        tokens: Tokens whose text has become certain, those of a scored prompt first.
    """

    text: str
    finish: str | None
    tokens: list[ScoredText] = field(default_factory=list)


@dataclass(frozen=True)
class PassPlan:
    """Plan of the next pass.

    Attributes:
        joining: Number, replica and request of each new continuation.
        leaving: Numbers of cancelled continuations.
        running: Whether any replica has a row.
        last: Whether the replicas stop after this pass.
    """

    joining: list[tuple[int, int, GenerationRequest]] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    running: bool = False
    last: bool = False


class ModelReplicas:
    """This rank's part of all replicas of the model."""

    def __init__(
        self, trained: TrainedModel, max_slots: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        """Create the engine of this rank's replica; see `GenerationEngine`."""
        self.trained, self.max_slots = trained, max_slots
        groups = trained.groups
        self.count, self._replica = groups.dp.size(), groups.dp.rank()
        self._alone = dist.get_world_size() == 1
        self._shares_experts = groups.ep.size() > 1
        self._reports = groups.tp.rank() == 0 and groups.pp.rank() == 0
        self._engine = GenerationEngine(trained, max_slots, prompt_tokens)
        self._rows: dict[int, GenerationRow] = {}
        self._numbers: dict[GenerationRow, int] = {}

    def run(self, plan: PassPlan) -> list[tuple[int, TokenEvent]]:
        """Run one pass on all ranks; call it on rank 0.

        Args:
            plan: Plan of the pass.

        Returns:
            Number and event of each continuation that got a token, for all replicas.
        """
        if not self._alone:
            dist.broadcast_object_list([plan])  # on all ranks, which together have every replica
        return self._run(plan)

    def follow(self) -> None:
        """Run the passes that rank 0 plans until the last one; rank 0 handles signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        last = False
        while not last:
            received: list[Any] = [None]
            dist.broadcast_object_list(received)
            self._run(received[0])
            last = received[0].last

    def _run(self, plan: PassPlan) -> list[tuple[int, TokenEvent]]:
        for number in plan.leaving:
            if number in self._rows:
                self._engine.drop(self._remove(number))
        for number, replica, request in plan.joining:
            if replica == self._replica:
                self._join(number, request)
        events = []
        if self._engine.rows:
            events = [self._event(*result) for result in self._engine.step()]
        elif plan.running and self._shares_experts:
            self._engine.idle()
        if self._alone:
            return events
        gathered: list[Any] | None = (
            [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        )
        dist.gather_object(events if self._reports else [], gathered)
        return [event for of_rank in gathered or [] for event in of_rank]

    def _join(self, number: int, request: GenerationRequest) -> None:
        row = GenerationRow(
            self.trained,
            request.prompt,
            request.sampling,
            request.seed,
            request.likeliest,
            request.scores_prompt,
        )
        self._rows[number], self._numbers[row] = row, number
        self._engine.add(row)

    def _event(self, row: GenerationRow, score: TokenScore, text: str) -> tuple[int, TokenEvent]:
        number, finish = self._numbers[row], row.completion.finish
        if finish is not None:
            self._remove(number)
        return number, TokenEvent(text, finish, row.released)

    def _remove(self, number: int) -> GenerationRow:
        row = self._rows.pop(number)
        del self._numbers[row]
        return row
