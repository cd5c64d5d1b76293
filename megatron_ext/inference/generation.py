"""Continuing prompts."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.inference.engine import GenerationEngine
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.row import Completion, GenerationRow, TokenScore
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class Token:
    """One sampled token, as it comes.

    Attributes:
        row: the prompt it continues.
        text: what can be shown for certain since the row's last token: half a character, or what
            may be the beginning of a stop string, waits.
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
    """Continue every prompt; see :func:`stream`, which this runs to its end."""
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

    Ranks of one copy of the model (tensor and pipeline parallel) must pass the same arguments and
    get the same tokens. Copies may pass different prompts, even none, but with expert parallelism
    they need each other's experts, so every rank must run its generator to the end.

    Args:
        prompts: token ids, at least one a row.
        seeds: one a row. A row's sample depends on its prompt and seed alone. Default: 0, 1, ...

    Raises:
        UserError: an empty prompt, one that leaves no room, or a token outside the vocabulary.
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
    """Run passes until the rows of all copies that share experts have left their engines; each
    gives what `GenerationEngine.step` does."""
    while _any_copy_works(engine.trained, bool(engine.rows)):
        if engine.rows:
            yield engine.step()
        else:
            engine.idle()
            yield []


def _any_copy_works(trained: TrainedModel, works: bool) -> bool:
    """Whether any rank whose experts are shared with this one still has rows to continue."""
    experts = trained.groups.ep
    if experts.size() == 1:
        return works
    flag = torch.tensor(int(works), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=experts)
    return bool(flag)
