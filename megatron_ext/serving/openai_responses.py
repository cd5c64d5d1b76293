"""Response objects of the API, built from the token events of continuations."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.inference.row import ScoredText
from megatron_ext.serving.openai_protocol import Call
from megatron_ext.serving.replicas import TokenEvent

_FINISH = {"eod": "stop", "stop": "stop", "length": "length", None: None}


def error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return the API's error object.

    Args:
        message: Description of the error.
        status: HTTP status.
        param: Field of the request that is wrong, or None.
    """
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class CompletionResponse:
    """Response to one call, as one object or in chunks.

    Attributes:
        new_tokens: Number of tokens generated so far.
        disconnected: Whether the client disconnected.
    """

    def __init__(self, call: Call, model: str) -> None:
        self.call = call
        self.new_tokens = 0
        self.disconnected = False
        kind = "chat.completion" if call.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._n = len(call.requests) // len(call.prompts)
        self._choices = [_Choice() for _ in call.requests]

    @property
    def usage(self) -> dict[str, int]:
        """Token counts; a prompt counts once for all its continuations."""
        prompt = sum(map(len, self.call.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
        }

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks that precede all tokens."""
        if not self.call.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, None, delta=delta) for index in range(len(self._choices))]

    def add(self, index: int, event: TokenEvent) -> list[dict[str, Any]]:
        """Add a token and return the chunk that reports it, or none if no text is certain yet.

        Args:
            index: Index of the choice.
            event: Event of the token.
        """
        choice, text, tokens = self._choices[index], event.text, event.tokens
        finish = _FINISH[event.finish]
        if self.call.only_prompt:  # one token was sampled, because a row generates at least one
            tokens = tokens[: len(self.call.requests[index].prompt)]
            text = "".join(token.part.text for token in tokens) if self.call.log_probs else ""
            finish = "length"
        else:
            self.new_tokens += 1
        if self.call.echo and not choice.started:
            text = self.call.echo[index // self._n] + text
        log_probs = None
        if self.call.log_probs:
            log_probs = self._log_probs(choice, tokens)
            for name, values in log_probs.items():
                choice.log_probs.setdefault(name, []).extend(values)
        choice.started = True
        choice.text += text
        choice.finish = finish
        if not (text or finish or (log_probs and tokens)):
            return []
        content = {"delta": {"content": text}} if self.call.chat else {"text": text}
        return [self._chunk(index, finish, logprobs=log_probs, **content)]

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunks that follow all tokens."""
        if not self.call.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self.usage}]

    def whole(self) -> dict[str, Any]:
        """Return the response as one object."""
        choices: list[dict[str, Any]] = []
        for index, choice in enumerate(self._choices):
            log_probs = choice.log_probs if self.call.log_probs else None
            content: dict[str, Any] = {"text": choice.text}
            if self.call.chat:
                content = {"message": {"role": "assistant", "content": choice.text}}
            finish = choice.finish
            choices.append(
                {"index": index, **content, "logprobs": log_probs, "finish_reason": finish}
            )
        return {**self._head, "choices": choices, "usage": self.usage}

    def _chunk(self, index: int, finish: str | None, **content: Any) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **content, "finish_reason": finish}
        usage = {"usage": None} if self.call.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _log_probs(self, choice: "_Choice", tokens: list[ScoredText]) -> dict[str, list[Any]]:
        if self.call.chat:
            return {"content": [_content(token) for token in tokens]}
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token.part.text)
        return {
            "tokens": [token.part.text for token in tokens],
            "token_logprobs": [token.score.log_prob if token.score else None for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens],
            "text_offset": offsets,
        }


@dataclass
class _Choice:
    """State of one continuation in the response."""

    started: bool = False
    text: str = ""
    finish: str | None = None
    log_probs: dict[str, list[Any]] = field(default_factory=dict)
    offset: int = 0  # in the text, of the next token


def _by_text(token: ScoredText) -> dict[str, float] | None:
    """Return log-probabilities by text; the highest one of several tokens with the same text."""
    if token.score is None:
        return None
    log_probs = {token.part.text: token.score.log_prob}
    for (text, _), (_, log_prob) in zip(token.likeliest, token.score.likeliest, strict=True):
        log_probs.setdefault(text, log_prob)
    return log_probs


def _content(token: ScoredText) -> dict[str, Any]:
    assert token.score is not None  # only the first token of a prompt has none
    top = [
        {"token": text, "logprob": log_prob, "bytes": list(data)}
        for (text, data), (_, log_prob) in zip(token.likeliest, token.score.likeliest, strict=True)
    ]
    return {
        "token": token.part.text,
        "logprob": token.score.log_prob,
        "bytes": list(token.part.data),
        "top_logprobs": top,
    }
