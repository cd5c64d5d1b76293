"""Prompts and scoring of CORE tasks, identical to those of nanochat and llm-foundry.

- Multiple choice: the options follow the question, and the option with the lowest mean loss over
  its tokens is chosen. Its tokens begin where the prompts of the options begin to differ.
- Schema: the contexts of all options have the same continuation, and the option with the lowest
  mean loss over the tokens that the prompts share at their end is chosen.
- Language modeling: the answer is right if every token of the continuation is the most likely one.

Solved examples precede a question, separated by empty lines. They are sampled from the other
questions of the task with a fixed seed.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.core.bundle import LANGUAGE_MODELING, SCHEMA, CoreQuestion, CoreTask
from megatron_ext.evaluation.log_likelihoods import LanguageModel, ScoringRequest

_ORDER_SEED, _SHOTS_SEED = 1337, 1234  # nanochat's, so that the same questions get the same shots


class ScoredItem(NamedTuple):
    """Result of a task.

    Attributes:
        answers: Chosen option of each question. For language modeling, 0 if the continuation is the
            most likely one, and -1 otherwise.
        right: Number of right answers.
        cropped: Number of prompts that lost tokens at their beginning.
        prompts: Number of prompts.
    """

    answers: list[int]
    right: int
    cropped: int
    prompts: int


class Prompts(NamedTuple):
    """Scoring requests of one question, one per option."""

    requests: list[ScoringRequest]
    cropped: int


def chosen_items(task: CoreTask, max_items: int | None) -> list[CoreQuestion]:
    """Return the first questions of a task in a fixed random order.

    Args:
        task: The task.
        max_items: Maximum number of questions; None for all.

    Raises:
        UserError: There are too few questions for the solved examples.
    """
    items = task.items()
    random.Random(_ORDER_SEED).shuffle(items)
    items = items[:max_items]
    if len(items) <= task.shots:
        raise UserError(
            f"Task {task.label} needs {task.shots} other questions as examples, and there are "
            f"{len(items) - 1}. Raise --max-items."
        )
    return items


def judge(
    task: CoreTask,
    items: Sequence[CoreQuestion],
    model: LanguageModel,
    max_length: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, prompts: None,
) -> ScoredItem:
    """Score all questions of a task. Every rank must call it.

    Args:
        task: The task.
        items: Its questions.
        model: The model.
        max_length: Maximum length of a prompt. Longer prompts lose tokens at their beginning.
        batch_tokens: Tokens per batch; see `LanguageModel.score`.
        progress: Callback that receives the numbers of finished and of all prompts.
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
    task: CoreTask, items: Sequence[CoreQuestion], index: int, model: LanguageModel, max_length: int
) -> Prompts:
    """Return the scoring requests of one question.

    Args:
        task: The task.
        items: Its questions.
        index: Index of the question.
        model: The model, whose tokenizer is used.
        max_length: Maximum length of a prompt, in tokens.
    """
    texts = texts_of(task, items, index)
    codec = model.codec
    sequences = [[codec.prefix, *codec.encode(text)] for text in texts]
    if task.kind == LANGUAGE_MODELING:
        # Usually the complete shorter prompt; less if a token crosses its end.
        context, full_text = sequences
        sequences = [full_text]
        starts = [min(_common_length([context, full_text]), len(full_text) - 1)]
    elif task.kind == SCHEMA:
        common = _common_length([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - max(common, 1) for sequence in sequences]
    else:
        # An option that is a prefix of another is scored by its last token.
        common = min(_common_length(sequences), *(len(sequence) - 1 for sequence in sequences))
        starts = [common] * len(sequences)
    requests, cropped = [], 0
    for sequence, start in zip(sequences, starts):
        lost = max(0, len(sequence) - max_length)
        cropped += lost > 0
        tokens = np.array(sequence[lost:], dtype=np.int32)
        requests.append(ScoringRequest(tokens, max(start - lost, 1)))
    return Prompts(requests, cropped)


def texts_of(task: CoreTask, items: Sequence[CoreQuestion], index: int) -> list[str]:
    """Return the prompt of each option; for language modeling, the context and the whole text.

    Args:
        task: The task.
        items: Its questions.
        index: Index of the question.
    """
    other_items = [i for i in range(len(items)) if i != index]
    examples = random.Random(_SHOTS_SEED + index).sample(other_items, task.shots)
    shots = ""
    for example in (items[i] for i in examples):
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
    """Return the length of the longest common prefix."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
