"""One prompt and its continuation: its tokens, when it ends, and what of its text is certain."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.cache import TokenChunk
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.text import TextStream, TokenText, detokenizer_of


@dataclass(frozen=True)
class TokenScore:
    """A token under the model, at temperature 1 with nothing cut off.

    Attributes:
        token: its id.
        log_prob: nats.
        likeliest: the likeliest tokens in its place and their log-probabilities, best first.
    """

    token: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ScoredText:
    """A token with its part of the answered text.

    Attributes:
        part: its text and bytes.
        score: None for the first token of a prompt, which has none.
        likeliest: text and bytes of the tokens in `score.likeliest`.
    """

    part: TokenText
    score: TokenScore | None
    likeliest: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Completion:
    """The continuation of one prompt.

    Attributes:
        tokens: all that were sampled, with the one that ended it.
        log_probs: of each under the model at temperature 1, nats.
        text: without the token that ended it, and up to where a stop string began.
        finish: why it ended; "length" is --max-new-tokens or the model's own length, "eod" a token
            that ends a document, "stop" a stop string or one of the sampling's stop tokens.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Literal["length", "stop", "eod"] | None = None


class GenerationRow:
    """A row of the batch.

    Attributes:
        likeliest: how many of the likeliest tokens each score shall name.
        scores_prompt: whether the prompt's own tokens are scored too; its text is then a part of
            the answered text.
        cached: how many of its tokens the cache holds.
        prompt_scores: of the prompt's tokens but the first, as far as they have been scored.
        ends: tokens that end the continuation.
        released: the tokens whose text the last call of `add` returned.
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
        self.prompt_scores: list[TokenScore] = []
        self.limit = min(len(self.prompt) + sampling.max_new_tokens, trained.max_length)
        if not self.prompt:
            raise UserError("a prompt is empty: give at least one token")
        if len(self.prompt) >= trained.max_length:
            raise UserError(
                f"a prompt has {len(self.prompt)} tokens, which leaves no room: the model was "
                f"trained with --max-position-embeddings {trained.max_length}"
            )
        if not all(0 <= token < trained.vocab_size for token in self.prompt):
            raise UserError(f"a prompt has a token outside the vocabulary of {trained.vocab_size}")
        self._tokenizer = trained.tokenizer
        self._document_ends = end_tokens(trained.tokenizer) if sampling.stop_at_eod else frozenset()
        self.ends = self._document_ends | frozenset(sampling.stop_token_ids)
        self.released: list[ScoredText] = []
        # Settled tokens that are not released, for a stop string may begin in them, and scores of
        # all that are not.
        self._parts: deque[TokenText] = deque()
        self._scores: deque[tuple[TokenScore | None, tuple[tuple[str, bytes], ...]]] = deque()
        self._stream: TextStream | None = None  # made with the first token
        self._released = 0  # characters of the stream's text
        self._start = 0  # where in it the continuation begins
        self._unfinished = 0  # tokens of the prompt that begin a character it does not complete
        self._begun_parts: list[TokenText] = []  # those of them that are settled
        self._exempt = 0  # characters in which no stop string may end

    @property
    def generates(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.cached >= len(self.prompt)

    def chunk(self, slot: int, most: int) -> TokenChunk:
        """The next tokens to run, at most so many of the prompt."""
        if self.generates:
            return TokenChunk(slot, self.cached, self.completion.tokens[-1:])
        tokens = self.prompt[self.cached : self.cached + most]
        whole = self.cached + len(tokens) == len(self.prompt)
        wanted = len(tokens) if self.scores_prompt else int(whole)
        return TokenChunk(slot, self.cached, tokens, wanted)

    def add(self, score: TokenScore) -> str:
        """Take a sampled token and return the text that is certain since the last.

        The text ends with a whole token, and in front of what may be the beginning of a stop
        string or of a character that takes several tokens. `released` has its tokens.
        """
        completion, token = self.completion, score.token
        stream = self._stream or self._begin()
        completion.tokens.append(token)
        completion.log_probs.append(score.log_prob)
        spelled = tuple(stream.spell(other) for other, _ in score.likeliest)
        self._scores.append((score, spelled))
        if token in self.ends:
            completion.finish = "eod" if token in self._document_ends else "stop"
            # Its own text is not a part of the answer.
            self._take([*stream.flush(), TokenText(token, "", b"")])
        else:
            self._take(stream.add(token))
            if len(self.prompt) + len(completion.tokens) == self.limit:
                completion.finish = "length"
                self._take(stream.flush())
        if len(completion.tokens) <= self.sampling.min_tokens:
            self._exempt = len(stream.certain)
        cut = self._stop(stream.certain)
        if cut is not None:
            completion.finish = "stop"
            self._take(stream.flush())
        text = stream.text if cut is None else stream.text[:cut]
        completion.text = text[self._start :]
        if completion.finish is None:
            self._release(stream.certain[: len(stream.certain) - self._begun(stream.certain)])
        else:
            self._release(text, last=True)
        return "".join(entry.part.text for entry in self.released)

    def _begin(self) -> TextStream:
        """Start the text: with the prompt where its tokens are scored, after it otherwise."""
        detokenizer = detokenizer_of(self._tokenizer, self.sampling.skip_special_tokens)
        if self.scores_prompt:
            stream = TextStream(detokenizer)
            for token, score in zip(self.prompt, [None, *self.prompt_scores], strict=True):
                likeliest = score.likeliest if score else ()
                spelled = tuple(stream.spell(other) for other, _ in likeliest)
                self._scores.append((score, spelled))
                self._take(stream.add(token))
            self._start = len(stream.certain)
        else:
            stream = TextStream(detokenizer, self.prompt)
            self._start = self._released = stream.start
            self._unfinished = stream.unfinished
        self._stream, self._exempt = stream, self._start
        return stream

    def _take(self, parts: list[TokenText]) -> None:
        """Keep settled tokens. Those of the prompt that began a character merge with the first
        token after them."""
        left = self._unfinished - len(self._begun_parts)
        self._begun_parts += parts[:left]
        parts = parts[left:]
        if parts and self._unfinished:
            first = [*self._begun_parts, parts[0]]
            text = "".join(part.text for part in first)
            data = b"".join(part.data for part in first)
            size = len(text[: self._start].encode())
            parts[0] = TokenText(parts[0].token, text[self._start :], data[size:])
            self._unfinished, self._begun_parts = 0, []
        self._parts += parts

    def _stop(self, text: str) -> int | None:
        """Where the first stop string begins in the continuation, or None."""
        found = []
        for stop in self.sampling.stop:
            first = max(self._start, self._released, self._exempt + 1 - len(stop))
            if (place := text.find(stop, first)) >= 0:
                found.append(place)
        return min(found, default=None)

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text may begin a stop string."""
        most = len(text) - self._start
        lengths = (
            length
            for stop in self.sampling.stop
            for length in range(min(len(stop) - 1, most), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _release(self, text: str, last: bool = False) -> None:
        """Release the tokens that lie within the first part of the stream's text; the last time
        all, cut to it."""
        left = text[self._released :]
        characters, data = len(left), len(left.encode())  # which no token has been given
        self.released = []
        while self._parts:
            part = self._parts[0]
            if len(part.text) > characters or len(part.data) > data:
                if not last:
                    break
                part = TokenText(part.token, part.text[:characters], part.data[:data])
            characters -= len(part.text)
            data -= len(part.data)
            self._parts.popleft()
            score, spelled = self._scores.popleft()
            if score is not None:  # the token itself is written in the same way among the likeliest
                itself = (part.text, part.data)
                ids = (other for other, _ in score.likeliest)
                spelled = tuple(
                    itself if other == part.token else pair for other, pair in zip(ids, spelled)
                )
            self.released.append(ScoredText(part, score, spelled))
        self._released += len(left) - characters
