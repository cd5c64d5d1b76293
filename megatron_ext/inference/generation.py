"""Continuing prompts with a key-value cache.

Rows of a batch are aligned at their first token. All rows run through the shortest prompt at once,
then token by token together; a row still inside its prompt is fed the prompt's next token instead
of a sampled one. So no row ever attends to padding, and its logits are those it has alone (up to
the rounding of a matrix product with another number of rows).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.inference.forward import full_logits, next_token_logits
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import Sampling, choose, log_probs_of

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4  # tokens


@dataclass
class Completion:
    """The continuation of one prompt.

    Attributes:
        tokens: all that were sampled, with the one that ended it.
        log_probs: of each under the model at temperature 1, nats.
        text: without the end-of-document token and from where a stop string began.
        finish: why it ended; "length" is --max-new-tokens or the model's own length.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Literal["length", "stop", "eod"] | None = None


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
    rows = [_Row(trained, prompt, sampling) for prompt in prompts]
    device = torch.cuda.current_device()
    generators = [
        torch.Generator().manual_seed(seed)
        for seed in (range(len(rows)) if seeds is None else seeds)
    ]
    if len(generators) != len(rows):
        raise ValueError(f"{len(generators)} seeds for {len(rows)} prompts")
    alive = list(range(len(rows)))  # the row of each line in the cache
    longest = max((row.limit for row in rows), default=1)
    context = StaticInferenceContext(len(rows), longest)
    position = min((len(prompt) for prompt in prompts), default=1)
    new = torch.tensor([row.prompt[:position] for row in rows], device=device)
    while _any_copy_works(trained, bool(alive)):
        if not alive:
            full_logits(trained, torch.zeros(1, 1, dtype=torch.int64, device=device))
            continue
        logits = next_token_logits(trained, new, context)
        sampled = [line for line, row in enumerate(alive) if rows[row].samples_at(position)]
        chosen = _choose_everywhere(
            trained, logits, sampled, sampling, [generators[alive[line]] for line in sampled]
        )
        for line, (token, log_prob) in zip(sampled, chosen, strict=True):
            yield Token(alive[line], token, log_prob, rows[alive[line]].add(token, log_prob))
        lines = [line for line, row in enumerate(alive) if rows[row].completion.finish is None]
        if len(lines) < len(alive):
            _keep_lines(context, torch.tensor(lines, dtype=torch.int64, device=device))
            alive = [alive[line] for line in lines]
        new = torch.tensor([[rows[row].token_at(position)] for row in alive], device=device)
        position += 1
    return [row.finished() for row in rows]


class _Row:
    """One prompt and its continuation so far."""

    def __init__(self, trained: TrainedModel, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = list(prompt), sampling
        self.completion = Completion()
        self.tokenizer = trained.tokenizer
        self.limit = min(len(self.prompt) + sampling.max_new_tokens, trained.max_length)
        self._shown = 0
        self._settled = ""  # text that no later token changes, of so many tokens:
        self._settled_tokens = 0
        # What comes before the rest decides whether it begins with a space.
        self._before = self.prompt[-_CONTEXT:]
        if not self.prompt:
            raise UserError("a prompt is empty: give at least one token")
        if len(self.prompt) >= trained.max_length:
            raise UserError(
                f"a prompt has {len(self.prompt)} tokens, which leaves no room: the model was "
                f"trained with --max-position-embeddings {trained.max_length}"
            )
        if not all(0 <= token < trained.vocab_size for token in self.prompt):
            raise UserError(f"a prompt has a token outside the vocabulary of {trained.vocab_size}")

    def samples_at(self, position: int) -> bool:
        """Whether the token at a position is the model's to choose."""
        return position >= len(self.prompt)

    def token_at(self, position: int) -> int:
        """The token at a position, of the prompt or sampled."""
        if position < len(self.prompt):
            return self.prompt[position]
        return self.completion.tokens[position - len(self.prompt)]

    def add(self, token: int, log_prob: float) -> str:
        """Take a sampled token and return the text that can be shown since the last."""
        completion = self.completion
        completion.tokens.append(token)
        completion.log_probs.append(log_prob)
        if token == self.tokenizer.eod and self.sampling.stop_at_eod:
            completion.finish = "eod"
        elif len(self.prompt) + len(completion.tokens) == self.limit:
            completion.finish = "length"
        completion.text = self._text()
        cuts = [at for stop in self.sampling.stop if (at := completion.text.find(stop)) >= 0]
        if cuts:
            completion.text, completion.finish = completion.text[: min(cuts)], "stop"
        return self._show(len(completion.text) - self._uncertain())

    def finished(self) -> Completion:
        assert self.completion.finish is not None
        return self.completion

    def _text(self) -> str:
        """All text so far. Only the last tokens are decoded, so that its cost stays the same."""
        rest = self.completion.tokens[self._settled_tokens :]
        if self.completion.finish == "eod":
            rest.pop()
        before: str = self.tokenizer.detokenize(self._before)
        text = self._settled + self.tokenizer.detokenize(self._before + rest)[len(before) :]
        if len(rest) >= 4 * _CONTEXT and not text.endswith(_REPLACEMENT):
            self._settled, self._before = text, rest[-_CONTEXT:]
            self._settled_tokens += len(rest)
        return text

    def _uncertain(self) -> int:
        """How many characters at the text's end later tokens may change or cut off."""
        if self.completion.finish is not None:
            return 0
        text = self.completion.text
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        begun = [
            length
            for stop in self.sampling.stop
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return max([broken, *begun])

    def _show(self, end: int) -> str:
        shown = self.completion.text[self._shown : end]
        self._shown = max(self._shown, end)
        return shown


def _choose_everywhere(
    trained: TrainedModel,
    logits: Tensor | None,
    lines: list[int],
    sampling: Sampling,
    generators: list[torch.Generator],
) -> list[tuple[int, float]]:
    """Choose tokens on the last pipeline stage and tell the others: token and log-probability."""
    if not lines:
        return []
    pipeline = trained.groups.pp
    # Token ids are exact in fp64, so one message carries both.
    packed = torch.empty(2, len(lines), dtype=torch.float64, device=torch.cuda.current_device())
    if logits is not None:
        logits = logits[lines].float()
        allowed = logits.clone()
        allowed[:, trained.vocab_size :] = -torch.inf
        tokens = choose(allowed, sampling, generators)
        packed[0], packed[1] = tokens, log_probs_of(logits, tokens)
    if pipeline.size() > 1:
        dist.broadcast(packed, group=pipeline, group_src=pipeline.size() - 1)
    tokens_and_log_probs: list[Any] = packed.tolist()
    return [(int(t), log_prob) for t, log_prob in zip(*tokens_and_log_probs, strict=True)]


def _any_copy_works(trained: TrainedModel, works: bool) -> bool:
    """Whether any rank whose experts are shared with this one still has rows to continue."""
    experts = trained.groups.ep
    if experts.size() == 1:
        return works
    flag = torch.tensor(int(works), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=experts)
    return bool(flag)


def _keep_lines(context: StaticInferenceContext, lines: Tensor) -> None:
    """Drop the other rows from the cache, so that finished rows cost nothing."""
    context.max_batch_size = len(lines)
    for layer, (key, value) in context.key_value_memory_dict.items():  # [positions, rows, ...]
        context.key_value_memory_dict[layer] = (key[:, lines], value[:, lines])
