"""How a CORE task is asked and judged, as nanochat and llm-foundry do.

- Multiple choice: the options follow the question; the one whose tokens have the lowest mean loss
  is chosen. Its tokens begin where the options' prompts begin to differ.
- Schema: every option's context has the same continuation; what is compared is the mean loss of
  the tokens that the prompts have in common at their end.
- Language modelling: right when each token of the continuation is the likeliest.

Solved examples precede a question, an empty line after each. They are drawn from the questions that
are asked, without the question itself, with a seed of its own.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.core.bundle import LANGUAGE_MODELING, SCHEMA, CoreTask, Item
from megatron_ext.evaluation.log_likelihoods import LanguageModel, ScoringRequest

_ORDER_SEED, _SHOTS_SEED = 1337, 1234  # nanochat's, so that the same questions get the same shots


class ScoredItem(NamedTuple):
    """A task's outcome.

    Attributes:
        answers: of each question, the option chosen; of language modelling, 0 where the
            continuation was met and -1 where not.
        right: how many answers are the right ones.
        cropped: how many prompts lost tokens at their beginning.
        prompts: how many there were.
    """

    answers: list[int]
    right: int
    cropped: int
    prompts: int


class Prompts(NamedTuple):
    """What is asked of the model for one question, an entry for each option."""

    requests: list[ScoringRequest]
    cropped: int


def chosen_items(task: CoreTask, most: int | None) -> list[Item]:
    """The questions to ask: shuffled the same way each time, the first `most` of them."""
    items = task.items()
    random.Random(_ORDER_SEED).shuffle(items)
    items = items[:most]
    if len(items) <= task.shots:
        raise UserError(
            f"{task.label} needs {task.shots} other questions as examples and there are "
            f"{len(items) - 1}: ask more with --max-items"
        )
    return items


def judge(
    task: CoreTask,
    items: Sequence[Item],
    model: LanguageModel,
    max_length: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, prompts: None,
) -> ScoredItem:
    """Ask all questions of a task; every rank must call it.

    Args:
        max_length: longer prompts lose tokens at their beginning.
        batch_tokens: see `LanguageModel.score`.
        progress: told how many prompts the model has read, and of how many.
    """
    prompts = [prompts_of(task, items, index, model, max_length) for index in range(len(items))]
    requests = [request for prompt in prompts for request in prompt.requests]
    read = 0

    def done(number: int) -> None:
        nonlocal read
        read += number
        progress(read, len(requests))

    scores = iter(model.score(requests, batch_tokens, done))
    answers = []
    for prompt in prompts:
        options = [next(scores) for _ in prompt.requests]
        if task.kind == LANGUAGE_MODELING:
            answers.append(0 if options[0].greedy else -1)
        else:
            means = [option.loss / option.tokens for option in options]
            answers.append(means.index(min(means)))
    right = sum(answer == item.gold for answer, item in zip(answers, items))
    cropped = sum(prompt.cropped for prompt in prompts)
    return ScoredItem(answers, right, cropped, len(requests))


def prompts_of(
    task: CoreTask, items: Sequence[Item], index: int, model: LanguageModel, max_length: int
) -> Prompts:
    """The prompts of one question and where in each the scored tokens begin."""
    texts = texts_of(task, items, index)
    codec = model.codec
    sequences = [[codec.prefix, *codec.encode(text)] for text in texts]
    if task.kind == LANGUAGE_MODELING:
        # Mostly the whole shorter prompt; less where a token reaches over its end.
        asked, whole = sequences
        sequences = [whole]
        starts = [min(_common_length([asked, whole]), len(whole) - 1)]
    elif task.kind == SCHEMA:
        common = _common_length([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - max(common, 1) for sequence in sequences]
    else:
        # An option that begins like another keeps its last token, to be told by.
        common = min(_common_length(sequences), *(len(sequence) - 1 for sequence in sequences))
        starts = [common] * len(sequences)
    requests, cropped = [], 0
    for sequence, start in zip(sequences, starts):
        lost = max(0, len(sequence) - max_length)
        cropped += lost > 0
        tokens = np.array(sequence[lost:], dtype=np.int32)
        requests.append(ScoringRequest(tokens, max(start - lost, 1)))
    return Prompts(requests, cropped)


def texts_of(task: CoreTask, items: Sequence[Item], index: int) -> list[str]:
    """Each option's prompt; of language modelling, without and with the continuation."""
    others = [i for i in range(len(items)) if i != index]
    drawn = random.Random(_SHOTS_SEED + index).sample(others, task.shots)
    shots = ""
    for example in (items[i] for i in drawn):
        context, continuation = example.options[example.gold]
        shots += f"{context}{task.delimiter}{continuation}\n\n"
    texts = [
        f"{shots}{context}{task.delimiter}{continuation}"
        for context, continuation in items[index].options
    ]
    if task.kind == LANGUAGE_MODELING:
        # Without the space before the continuation, which begins the continuation's first token.
        return [f"{shots}{items[index].contexts[0]}{task.delimiter}".rstrip(), *texts]
    return texts


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
