"""Generation of continuations of prompts."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.inference.engine import GenerationEngine
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.row import NOT_FINITE, Completion, GenerationRow, TokenScore
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class Token:
    """Sampled token of a running generation.

    Attributes:
        row: Index of the prompt.
        token: Token id.
        log_prob: Log-probability, in nats.
        text: Text that has become certain since the row's last token. An incomplete character and
            a possible beginning of a stop string are withheld.
    """

    row: int
    token: int
    log_prob: float
    text: str


def generate(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue every prompt and return the completions.

    Args:
        trained: The model.
        prompts: Token ids of each prompt, at least one each.
        sampling: Sampling settings.
        seeds: Seed of each prompt; see :func:`stream`.
    """
    generation = stream(trained, prompts, sampling, seeds)
    while True:
        try:
            next(generation)
        except StopIteration as end:
            return end.value


def stream(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> Generator[Token, None, list[Completion]]:
    """Continue prompts and yield tokens as they are sampled; the generator returns Completions.

    The ranks of one replica of the model (tensor and pipeline parallel) must pass the same
    arguments and get the same tokens. Replicas may pass different prompts, or none. With expert
    parallelism they need each other's experts, so that every rank must exhaust its generator.

    Args:
        trained: The model.
        prompts: Token ids of each prompt, at least one each.
        sampling: Sampling settings.
        seeds: Seed of each prompt. A sample depends only on its prompt and seed. Default: 0, 1, ...

    Raises:
        UserError: A prompt is empty, too long, or contains a token outside the vocabulary, or
            logits are not finite.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    rows = [GenerationRow(trained, prompt, sampling, seed) for prompt, seed in zip(prompts, seeds)]
    numbers = {row: number for number, row in enumerate(rows)}
    engine = GenerationEngine(trained, max_slots=len(rows))
    for row in rows:
        engine.add(row)
    for events in passes(engine):
        for row, score, text in events:
            yield Token(numbers[row], score.token, score.log_prob, text)
    return [row.completion for row in rows]


def passes(engine: GenerationEngine) -> Iterator[list[tuple[GenerationRow, TokenScore, str]]]:
    """Run passes until all replicas that share experts have no rows left.

    Yields:
        Results of `GenerationEngine.step`; empty while only other replicas have rows.

    Raises:
        UserError: Logits are not finite.
    """
    while _any_replica_has_rows(engine.trained, bool(engine.rows)):
        if engine.rows:
            events = engine.step()
            if any(row.completion.finish == "failed" for row, _, _ in events):
                raise UserError(NOT_FINITE)
            yield events
        else:
            engine.idle()
            yield []


def _any_replica_has_rows(trained: TrainedModel, has_rows: bool) -> bool:
    """Return whether any rank that shares experts with this one has rows."""
    experts = trained.groups.ep
    if experts.size() == 1:
        return has_rows
    flag = torch.tensor(int(has_rows), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=experts)
    return bool(flag)
