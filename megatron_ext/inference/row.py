"""One prompt and its continuation: its tokens, when it ends, and what of its text is certain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.cache import Chunk
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import Sampling

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4  # tokens


@dataclass(frozen=True)
class Score:
    """A token under the model, at temperature 1 with nothing cut off.

    Attributes:
        token: its id.
        log_prob: nats.
        likeliest: the likeliest tokens in its place and their log-probabilities, best first.
    """

    token: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """The continuation of one prompt.

    Attributes:
        tokens: all that were sampled, with the one that ended it.
        log_probs: of each under the model at temperature 1, nats.
        text: without the end token that ended it and from where a stop string began.
        finish: why it ended; "length" is --max-new-tokens or the model's own length.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Literal["length", "stop", "eod"] | None = None


class Row:
    """A row of the batch.

    Attributes:
        likeliest: how many of the likeliest tokens each score shall name.
        scores_prompt: whether the prompt's own tokens are scored too.
        cached: how many of its tokens the cache holds.
        prompt_scores: of the prompt's tokens but the first, as far as they have been scored.
    """

    def __init__(
        self,
        trained: TrainedModel,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int,
        likeliest: int = 0,
        scores_prompt: bool = False,
    ) -> None:
        """Check a prompt.

        Raises:
            UserError: it is empty, leaves no room, or has a token outside the vocabulary.
        """
        self.prompt, self.sampling = list(prompt), sampling
        self.likeliest, self.scores_prompt = likeliest, scores_prompt
        self.generator = torch.Generator().manual_seed(seed)
        self.completion = Completion()
        self.cached = 0
        self.prompt_scores: list[Score] = []
        self.limit = min(len(self.prompt) + sampling.max_new_tokens, trained.max_length)
        self._tokenizer = trained.tokenizer
        self._end_tokens = end_tokens(trained.tokenizer)
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
        self._before_text: str = self._tokenizer.detokenize(self._before)

    @property
    def generates(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.cached >= len(self.prompt)

    def chunk(self, line: int, most: int) -> Chunk:
        """The next tokens to run, at most so many of the prompt."""
        if self.generates:
            return Chunk(line, self.cached, self.completion.tokens[-1:])
        tokens = self.prompt[self.cached : self.cached + most]
        whole = self.cached + len(tokens) == len(self.prompt)
        wanted = len(tokens) if self.scores_prompt else int(whole)
        return Chunk(line, self.cached, tokens, wanted)

    def add(self, score: Score) -> str:
        """Take a sampled token and return the text that can be shown since the last."""
        completion, token = self.completion, score.token
        completion.tokens.append(token)
        completion.log_probs.append(score.log_prob)
        if token in self._end_tokens and self.sampling.stop_at_eod:
            completion.finish = "eod"
        elif len(self.prompt) + len(completion.tokens) == self.limit:
            completion.finish = "length"
        completion.text = self._text()
        cuts = [at for stop in self.sampling.stop if (at := completion.text.find(stop)) >= 0]
        if cuts:
            completion.text, completion.finish = completion.text[: min(cuts)], "stop"
        return self._show(len(completion.text) - self._uncertain())

    def _text(self) -> str:
        """All text so far. Only the last tokens are decoded, so that its cost stays the same."""
        rest = self.completion.tokens[self._settled_tokens :]
        if self.completion.finish == "eod":
            rest.pop()
        after: str = self._tokenizer.detokenize(self._before + rest)
        text = self._settled + after[len(self._before_text) :]
        if len(rest) >= 4 * _CONTEXT and not text.endswith(_REPLACEMENT):
            self._settled, self._before = text, rest[-_CONTEXT:]
            self._before_text = self._tokenizer.detokenize(self._before)
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
