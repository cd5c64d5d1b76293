"""State of one prompt and its continuation: tokens, end conditions, and final text."""

import math
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

NOT_FINITE = (
    "The logits of the model are not finite, so no token can be sampled. Its weights have diverged "
    "or are damaged. Use an earlier checkpoint."
)


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token under the model, before top-k and other truncation.

    Attributes:
        token: Token id.
        log_prob: Log-probability, in nats.
        likeliest: Most likely tokens in its place and their log-probabilities, best first.
    """

    token: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ScoredText:
    """Token with its part of the text and its score.

    Attributes:
        part: Text and bytes of the token.
        score: Score of the token; None for the first token of a prompt.
        likeliest: Text and bytes of the tokens in `score.likeliest`.
    """

    part: TokenText
    score: TokenScore | None
    likeliest: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Completion:
    """Continuation of one prompt.

    Attributes:
        tokens: All sampled tokens, including the one that ended the continuation.
        log_probs: Log-probability of each token under the model at temperature 1, in nats.
        text: Text without the token or the stop string that ended the continuation.
        finish: Reason for the end: "length" is --max-new-tokens or the context length of the model,
            "eod" an end token, "stop" a stop string or a stop token of the sampling settings,
            "failed" logits that are not finite, from which no token can be sampled.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Literal["length", "stop", "eod", "failed"] | None = None


class GenerationRow:
    """Row of the batch: one prompt and its continuation.

    Attributes:
        likeliest: Number of most likely tokens that each score lists.
        scores_prompt: Whether the tokens of the prompt are scored, too. The text then includes the
            prompt.
        cached: Number of the row's tokens in the cache.
        prompt_scores: Scores of the prompt's tokens except the first, as far as they exist.
        ends: Tokens that end the continuation.
        released: Tokens whose text the last call of `add` returned.
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
        """Create a row and check its prompt.

        Args:
            trained: The model.
            prompt: Token ids of the prompt.
            sampling: Sampling settings.
            seed: Seed of the sampling.
            likeliest: Number of most likely tokens that each score lists.
            scores_prompt: Whether the tokens of the prompt are scored, too.

        Raises:
            UserError: The prompt is empty, too long, or has a token outside the vocabulary.
        """
        self.prompt, self.sampling = list(prompt), sampling
        self.likeliest, self.scores_prompt = likeliest, scores_prompt
        self.generator = torch.Generator().manual_seed(seed)
        self.completion = Completion()
        self.cached = 0
        self.prompt_scores: list[TokenScore] = []
        self.limit = min(len(self.prompt) + sampling.max_new_tokens, trained.max_length)
        if not self.prompt:
            raise UserError("A prompt is empty. Give at least one token.")
        if len(self.prompt) >= trained.max_length:
            raise UserError(
                f"A prompt has {len(self.prompt)} tokens, which leaves no room for new ones: the "
                f"model was trained with --max-position-embeddings {trained.max_length}. Shorten "
                "the prompt."
            )
        if not all(0 <= token < trained.vocab_size for token in self.prompt):
            raise UserError(
                f"A prompt has a token outside the vocabulary of {trained.vocab_size}. Tokenize it "
                "with the model's tokenizer."
            )
        self._tokenizer = trained.tokenizer
        ends = end_tokens(trained.tokenizer) if sampling.stop_at_eod else frozenset()
        # Files of a model may name ends that its tokenizer lacks; these are never chosen.
        self._document_ends = frozenset(token for token in ends if token < trained.vocab_size)
        self.ends = self._document_ends | frozenset(sampling.stop_token_ids)
        self.released: list[ScoredText] = []
        # Settled tokens that are not released yet, because a stop string may begin in them, and the
        # scores of all tokens that are not released.
        self._parts: deque[TokenText] = deque()
        self._scores: deque[tuple[TokenScore | None, tuple[tuple[str, bytes], ...]]] = deque()
        self._stream: TextStream | None = None  # created with the first token
        self._released = 0  # number of released characters of the stream's text
        self._start = 0  # position of the continuation in the stream's text
        self._unfinished = 0  # number of prompt tokens of an incomplete character at its end
        self._unfinished_parts: list[TokenText] = []  # those of them that are settled
        self._exempt = 0  # number of characters in which no stop string may end

    @property
    def generates(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.cached >= len(self.prompt)

    def chunk(self, slot: int, max_prompt_tokens: int) -> TokenChunk:
        """Return the next tokens to run.

        Args:
            slot: Slot of the row in the cache.
            max_prompt_tokens: Maximum number of prompt tokens.
        """
        if self.generates:
            return TokenChunk(slot, self.cached, self.completion.tokens[-1:])
        tokens = self.prompt[self.cached : self.cached + max_prompt_tokens]
        completes_prompt = self.cached + len(tokens) == len(self.prompt)
        scored = len(tokens) if self.scores_prompt else int(completes_prompt)
        return TokenChunk(slot, self.cached, tokens, scored)

    def add(self, score: TokenScore) -> str:
        """Add a sampled token and return the text that has become certain.

        The text consists of complete tokens. It ends before a possible beginning of a stop string
        and before an incomplete character. `released` contains its tokens.
        """
        completion, token = self.completion, score.token
        # A logit that is NaN or +inf makes every log-probability of its position NaN.
        if not all(math.isfinite(s.log_prob) for s in self._new_scores(score)):
            completion.finish, self.released = "failed", []
            return ""
        stream = self._stream or self._begin()
        completion.tokens.append(token)
        completion.log_probs.append(score.log_prob)
        spellings = tuple(stream.spell(other) for other, _ in score.likeliest)
        self._scores.append((score, spellings))
        if token in self.ends:
            completion.finish = "eod" if token in self._document_ends else "stop"
            # The text of an end token does not belong to the continuation.
            self._take([*stream.flush(), TokenText(token, "", b"")])
        else:
            self._take(stream.add(token))
            if len(self.prompt) + len(completion.tokens) == self.limit:
                completion.finish = "length"
                self._take(stream.flush())
        if len(completion.tokens) <= self.sampling.min_tokens:
            self._exempt = len(stream.certain)
        stop_position = self._stop(stream.certain)
        if stop_position is not None:
            completion.finish = "stop"
            self._take(stream.flush())
        text = stream.text if stop_position is None else stream.text[:stop_position]
        completion.text = text[self._start :]
        if completion.finish is None:
            withheld = self._stop_prefix(stream.certain)
            self._release(stream.certain[: len(stream.certain) - withheld])
        else:
            self._release(text, last=True)
        return "".join(entry.part.text for entry in self.released)

    def _new_scores(self, score: TokenScore) -> Sequence[TokenScore]:
        """Return a score, with those of the prompt if it is the first."""
        return (score,) if self.completion.tokens else (*self.prompt_scores, score)

    def _begin(self) -> TextStream:
        """Create the text stream, which includes the prompt if its tokens are scored."""
        detokenizer = detokenizer_of(self._tokenizer, self.sampling.skip_special_tokens)
        if self.scores_prompt:
            stream = TextStream(detokenizer)
            for token, score in zip(self.prompt, [None, *self.prompt_scores], strict=True):
                likeliest = score.likeliest if score else ()
                spellings = tuple(stream.spell(other) for other, _ in likeliest)
                self._scores.append((score, spellings))
                self._take(stream.add(token))
            self._start = len(stream.certain)
        else:
            stream = TextStream(detokenizer, self.prompt)
            self._start = self._released = stream.start
            self._unfinished = stream.unfinished
        self._stream, self._exempt = stream, self._start
        return stream

    def _take(self, parts: list[TokenText]) -> None:
        """Store settled tokens.

        Prompt tokens of an incomplete character are merged with the first token after them.
        """
        missing = self._unfinished - len(self._unfinished_parts)
        self._unfinished_parts += parts[:missing]
        parts = parts[missing:]
        if parts and self._unfinished:
            first = [*self._unfinished_parts, parts[0]]
            text = "".join(part.text for part in first)
            data = b"".join(part.data for part in first)
            size = len(text[: self._start].encode())
            parts[0] = TokenText(parts[0].token, text[self._start :], data[size:])
            self._unfinished, self._unfinished_parts = 0, []
        self._parts += parts

    def _stop(self, text: str) -> int | None:
        """Return the position of the first stop string in the continuation, or None."""
        positions = []
        for stop in self.sampling.stop:
            first = max(self._start, self._released, self._exempt + 1 - len(stop))
            if (position := text.find(stop, first)) >= 0:
                positions.append(position)
        return min(positions, default=None)

    def _stop_prefix(self, text: str) -> int:
        """Return the number of characters at the end of a text that may begin a stop string."""
        available = len(text) - self._start
        lengths = (
            length
            for stop in self.sampling.stop
            for length in range(min(len(stop) - 1, available), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _release(self, text: str, last: bool = False) -> None:
        """Release the tokens that lie within the text.

        Args:
            text: Beginning of the stream's text.
            last: Whether all remaining tokens are released, truncated to the text.
        """
        rest = text[self._released :]
        characters, data = len(rest), len(rest.encode())  # not yet assigned to tokens
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
            score, spellings = self._scores.popleft()
            if score is not None:  # among the most likely, the token is spelled in the same way
                spelling = (part.text, part.data)
                ids = (other for other, _ in score.likeliest)
                spellings = tuple(
                    spelling if other == part.token else pair for other, pair in zip(ids, spellings)
                )
            self.released.append(ScoredText(part, score, spellings))
        self._released += len(rest) - characters
