"""What the API takes: bodies of requests, checked, as continuations to make."""

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.chat import prompt_ids
from megatron_ext.errors import UserError
from megatron_ext.hf.tokenizers import as_transformers
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import Sampling
from megatron_ext.serving.copies import Work

_MOST_LIKELIEST = 20
_MOST_STOPS = 16
# Fields of the API that would change the result, and their values that would not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
}


class BadRequest(Exception):
    """A request that cannot be served as it is: one sentence, and the field to change."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Limits:
    """The most a request may ask for; None is the model's own length.

    Attributes:
        choices: prompts times n.
        new_tokens: of one continuation.
        prompt_tokens: of one prompt.
    """

    choices: int = 32
    new_tokens: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
        works: of all choices, n for each prompt.
        prompts: token ids of each prompt.
        log_probs: whether scores are to be answered.
        echo: the text of each prompt to answer before the continuation, where asked for.
        only_prompt: answer nothing but the prompt (max_tokens 0 with echo).
    """

    chat: bool
    works: list[Work]
    prompts: list[list[int]]
    stream: bool
    include_usage: bool
    log_probs: bool
    echo: list[str] = field(default_factory=list)
    only_prompt: bool = False


class Reader:
    """Checks requests for one model."""

    def __init__(
        self, trained: TrainedModel, name: str, limits: Limits, chat_template: str | None = None
    ) -> None:
        self.trained, self.name, self.limits = trained, name, limits
        template = chat_template or getattr(trained.tokenizer, "chat_template", None)
        self.chat_template: str | None = template
        self._chat_tokenizer = as_transformers(trained.tokenizer)

    def completion(self, body: dict[str, Any]) -> Call:
        """Check a body of /v1/completions.

        Raises:
            BadRequest: naming the field and what it may be.
        """
        self._check_common(body)
        prompts, texts = self._prompts(body.get("prompt"))
        count = _integer(body, "logprobs", 0, _MOST_LIKELIEST, None)
        echo = _boolean(body, "echo")
        left = self.trained.max_length - max(map(len, prompts))
        default = max(1, min(16, left, self.limits.new_tokens or left))
        most = _integer(body, "max_tokens", 0 if echo else 1, None, default)
        works = self._works(
            body, prompts, max(most or 0, 1), count or 0, echo and count is not None
        )
        return Call(
            chat=False,
            works=works,
            prompts=prompts,
            log_probs=count is not None,
            echo=[self._text(*pair) for pair in zip(texts, prompts)] if echo else [],
            only_prompt=most == 0,
            **_streaming(body),
        )

    def chat(self, body: dict[str, Any]) -> Call:
        """Check a body of /v1/chat/completions; see `completion`."""
        self._check_common(body)
        prompt = self._chat_prompt(body.get("messages"))
        log_probs = _boolean(body, "logprobs")
        count = _integer(body, "top_logprobs", 0, _MOST_LIKELIEST, 0) or 0
        if count and not log_probs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        newer = body.get("max_completion_tokens") is not None
        name = "max_completion_tokens" if newer else "max_tokens"
        left = self.trained.max_length - len(prompt)
        rest = min(left, self.limits.new_tokens or left)
        most = _integer(body, name, 1, None, max(rest, 1))
        works = self._works(body, [prompt], most or 1, count, False, name)
        return Call(
            chat=True, works=works, prompts=[prompt], log_probs=log_probs, **_streaming(body)
        )

    def _check_common(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if model is not None and model != self.name:
            raise BadRequest(f"there is no model {model!r} here, only {self.name!r}", "model", 404)
        for name, harmless in _UNSUPPORTED.items():
            if body.get(name) not in harmless:
                raise BadRequest(f"{name} is not supported: leave it out", name)

    def _prompts(self, given: Any) -> tuple[list[list[int]], list[str | None]]:
        """Token ids of the prompts, and their texts where these were given."""
        if isinstance(given, str) or (isinstance(given, list) and _all_integers(given)):
            given = [given]
        if not isinstance(given, list) or not given:
            raise BadRequest("prompt must be text, token ids, or a list of either", "prompt")
        if len(given) > self.limits.choices:
            raise BadRequest(f"at most {self.limits.choices} choices a request", "prompt")
        prompts, texts = [], []
        for prompt in given:
            if isinstance(prompt, str):
                prompts.append(self._tokenize(prompt))
            elif isinstance(prompt, list) and _all_integers(prompt):
                prompts.append(prompt)
            else:
                raise BadRequest("prompt must be text, token ids, or a list of either", "prompt")
            texts.append(prompt if isinstance(prompt, str) else None)
        return prompts, texts

    def _chat_prompt(self, messages: Any) -> list[int]:
        if self.chat_template is None:
            raise BadRequest(
                "the model's tokenizer has no chat template: use /v1/completions, or start the "
                "server with --chat-template"
            )
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one message", "messages")
        conversation = [_message(message) for message in messages]
        if self._chat_tokenizer is None:
            raise BadRequest(
                "the model's tokenizer has no text: use /v1/completions with token ids"
            )
        try:
            return prompt_ids(self._chat_tokenizer, conversation, chat_template=self.chat_template)
        except UserError as error:
            raise BadRequest(str(error), "messages") from error

    def _tokenize(self, text: str) -> list[int]:
        try:
            text.encode()  # JSON can hold halves of characters
            return self.trained.tokenizer.tokenize(text)
        except (ValueError, KeyError) as error:
            raise BadRequest(
                f"the model's tokenizer cannot read the prompt: {error}", "prompt"
            ) from error

    def _text(self, text: str | None, tokens: list[int]) -> str:
        return self.trained.tokenizer.detokenize(tokens) if text is None else text

    def _works(
        self,
        body: dict[str, Any],
        prompts: list[list[int]],
        most: int,
        likeliest: int,
        scores_prompt: bool,
        most_name: str = "max_tokens",
    ) -> list[Work]:
        n = _integer(body, "n", 1, None, 1) or 1
        if n * len(prompts) > self.limits.choices:
            raise BadRequest(f"at most {self.limits.choices} choices a request", "n")
        if self.limits.new_tokens is not None and most > self.limits.new_tokens:
            raise BadRequest(f"{most_name} is at most {self.limits.new_tokens} here", most_name)
        for prompt in prompts:
            self._check_length(prompt, most, most_name)
        seed = _integer(body, "seed", -(2**63), 2**63 - 1, None)
        seed = secrets.randbelow(2**62) if seed is None else seed
        sampling = _sampling(body, most)
        return [
            Work(prompt, sampling, seed + i, likeliest, scores_prompt)
            for prompt in prompts
            for i in range(n)
        ]

    def _check_length(self, prompt: list[int], most: int, most_name: str) -> None:
        length = self.trained.max_length
        longest = min(self.limits.prompt_tokens or length - 1, length - 1)
        if not prompt:
            raise BadRequest("a prompt needs at least one token", "prompt")
        if len(prompt) > longest:
            raise BadRequest(f"a prompt has {len(prompt)} tokens, at most {longest} fit", "prompt")
        if len(prompt) + most > length:
            raise BadRequest(
                f"a prompt of {len(prompt)} tokens and {most_name} {most} exceed the model's "
                f"length of {length}",
                most_name,
            )
        if not all(0 <= token < self.trained.vocab_size for token in prompt):
            raise BadRequest(f"token ids are below {self.trained.vocab_size}", "prompt")


def _sampling(body: dict[str, Any], most: int) -> Sampling:
    temperature = _number(body, "temperature", 0, 100, 1.0)
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest("stop must be text or a list of texts, none empty", "stop")
    if len(stops) > _MOST_STOPS or any(len(s) > 1000 for s in stops):
        raise BadRequest(f"stop takes at most {_MOST_STOPS} texts of 1,000 characters", "stop")
    top_p = _number(body, "top_p", 0, 1, 1.0)
    if top_p == 0:
        raise BadRequest("top_p must be above 0", "top_p")
    return Sampling(
        max_new_tokens=most,
        temperature=temperature or 1.0,
        top_k=_integer(body, "top_k", 0, None, 0) or 0,
        top_p=top_p,
        greedy=temperature == 0,
        stop=tuple(stops),
        stop_at_eod=not _boolean(body, "ignore_eos"),
    )


def _streaming(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    return {
        "stream": _boolean(body, "stream"),
        "include_usage": _boolean(options, "include_usage"),
    }


def _message(message: Any) -> dict[str, str]:
    """Role and text of a message; its content may be a list of parts of type text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest("a message is an object with role and content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        strings = [text for text in texts if isinstance(text, str)]
        content = "".join(strings) if len(strings) == len(texts) else None
    if not isinstance(content, str):
        raise BadRequest("the content of a message must be text", "messages")
    return {"role": message["role"], "content": content}


def _all_integers(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _integer(
    body: dict[str, Any], name: str, least: int, most: int | None, default: int | None
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise BadRequest(f"{name} must be a whole number, {bounds}", name)
    return value


def _number(body: dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise BadRequest(f"{name} must be a number from {least} to {most}", name)
    return float(value)


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise BadRequest(f"{name} must be true or false", name)
    return bool(value)
