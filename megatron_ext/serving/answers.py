"""What the API answers: continuations as the objects of completions and chat completions."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.inference.row import Score
from megatron_ext.serving.copies import Piece
from megatron_ext.serving.protocol import Call

_FINISH = {"eod": "stop", "stop": "stop", "length": "length", None: None}


def error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The API's error object."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Answer:
    """The answer to one call, whole or in chunks."""

    def __init__(self, call: Call, model: str, tokenizer: Any) -> None:
        self.call, self._tokenizer = call, tokenizer
        self.new_tokens = 0
        self.left = False  # whether the client went away
        kind = "chat.completion" if call.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._n = len(call.works) // len(call.prompts)
        self._choices = [_Choice() for _ in call.works]
        # The last token of each choice, which decides how the next one is spelled; and how long
        # its text is.
        self._before = [work.prompt[-1] for work in call.works]
        self._offsets = [0 for _ in call.works]

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens; a prompt counts once for all its continuations."""
        prompt = sum(map(len, self.call.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
        }

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before any token."""
        if not self.call.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, None, delta=delta) for index in range(len(self._choices))]

    def add(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Take a token; returns the chunk that tells of it, or none if there is nothing to tell."""
        texts, scores = [], []
        if self.call.echo and not self._choices[index].started:
            texts.append(self.call.echo[index // self._n])
            scores += self._prompt_scores(index, piece)
        self._choices[index].started = True
        if not self.call.only_prompt:
            self.new_tokens += 1
            texts.append(piece.text)
            scores += [piece.score]
        text, finish = "".join(texts), _FINISH[piece.finish]
        choice = self._choices[index]
        choice.text += text
        choice.finish = finish
        log_probs = self._log_probs(index, scores) if self.call.log_probs else None
        if log_probs is not None:
            for name, values in log_probs.items():
                choice.log_probs.setdefault(name, []).extend(values)
        if not (text or finish or log_probs):
            return []
        shown = {"delta": {"content": text}} if self.call.chat else {"text": text}
        return [self._chunk(index, finish, logprobs=log_probs, **shown)]

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after all tokens."""
        if not self.call.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self.usage}]

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices: list[dict[str, Any]] = []
        for index, choice in enumerate(self._choices):
            log_probs = choice.log_probs if self.call.log_probs else None
            shown: dict[str, Any] = {"text": choice.text}
            if self.call.chat:
                shown = {"message": {"role": "assistant", "content": choice.text}}
            finish = choice.finish
            choices.append(
                {"index": index, **shown, "logprobs": log_probs, "finish_reason": finish}
            )
        return {**self._head, "choices": choices, "usage": self.usage}

    def _chunk(self, index: int, finish: str | None, **shown: Any) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **shown, "finish_reason": finish}
        usage = {"usage": None} if self.call.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _prompt_scores(self, index: int, piece: Piece) -> list[Score | int]:
        """Scores of the prompt's tokens; the first has none, only its id."""
        first: list[Score | int] = [self.call.works[index].prompt[0]]
        return first + list(piece.prompt_scores) if self.call.log_probs else []

    def _log_probs(self, index: int, scores: Sequence[Score | int]) -> dict[str, list[Any]]:
        spelled = [self._spelled(index, score) for score in scores]
        if self.call.chat:
            return {"content": [_content(*entry) for entry in spelled]}
        offsets = []
        for text, _, _ in spelled:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": [text for text, _, _ in spelled],
            "token_logprobs": [log_prob for _, log_prob, _ in spelled],
            "top_logprobs": [_by_text(*entry) for entry in spelled],
            "text_offset": offsets,
        }

    def _spelled(
        self, index: int, score: Score | int
    ) -> tuple[str, float | None, list[tuple[str, float]]]:
        """Text and log-probability of a token, and of the likeliest in its place."""
        if isinstance(score, int):  # of the prompt's first token nothing but its id is known
            self._before[index] = score
            return self._tokenizer.detokenize([score]), None, []
        before = self._before[index]
        self._before[index] = score.token
        likeliest = [(self._spell(before, token), value) for token, value in score.likeliest]
        return self._spell(before, score.token), score.log_prob, likeliest

    def _spell(self, before: int, token: int) -> str:
        """The text a token adds to the one before it."""
        start: str = self._tokenizer.detokenize([before])
        return self._tokenizer.detokenize([before, token])[len(start) :]


@dataclass
class _Choice:
    """What has been answered of one continuation."""

    started: bool = False
    text: str = ""
    finish: str | None = None
    log_probs: dict[str, list[Any]] = field(default_factory=dict)


def _by_text(
    text: str, log_prob: float | None, likeliest: list[tuple[str, float]]
) -> dict[str, float] | None:
    """The likeliest tokens and the token itself; of several with one text, the likeliest."""
    if log_prob is None:
        return None
    found: dict[str, float] = {}
    for name, value in [*likeliest, (text, log_prob)]:
        found.setdefault(name, value)
    return found


def _content(
    text: str, log_prob: float | None, likeliest: list[tuple[str, float]]
) -> dict[str, Any]:
    top = [{"token": t, "logprob": value, "bytes": list(t.encode())} for t, value in likeliest]
    return {
        "token": text,
        "logprob": log_prob,
        "bytes": list(text.encode()),
        "top_logprobs": top,
    }
