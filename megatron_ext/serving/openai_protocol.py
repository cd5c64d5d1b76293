"""Translation of API requests into generation requests."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.chat_templates import prompt_ids
from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.errors import UserError
from megatron_ext.hf.tokenizer_export import as_transformers
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.inference.sampling import Sampling
from megatron_ext.inference.text import detokenizer_of
from megatron_ext.serving.bodies import (
    BadRequest,
    ChatBody,
    ChatMessage,
    CompletionBody,
    read_body,
)
from megatron_ext.serving.replicas import GenerationRequest

_PROMPT_TYPES = "prompt must be text, token ids, or a list of either."


@dataclass(frozen=True)
class RequestLimits:
    """Upper bounds of a request; None means the context length of the model.

    Attributes:
        choices: Number of prompts times n.
        new_tokens: New tokens of one continuation.
        prompt_tokens: Tokens of one prompt.
    """

    choices: int = 32
    new_tokens: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Call:
    """Checked request of a client.

    Attributes:
        chat: Whether the request is a chat.
        requests: One generation request per choice, n for each prompt.
        prompts: Token ids of each prompt.
        stream: Whether the response is streamed.
        include_usage: Whether a stream ends with token counts.
        log_probs: Whether the response contains log-probabilities.
        echo: Text of each prompt that precedes the continuation in the response. Empty without
            echo, and if the scored tokens of the prompt make up its text.
        only_prompt: Whether the response contains the prompt alone (max_tokens 0 with echo).
    """

    chat: bool
    requests: list[GenerationRequest]
    prompts: list[list[int]]
    stream: bool
    include_usage: bool
    log_probs: bool
    echo: list[str] = field(default_factory=list)
    only_prompt: bool = False


class RequestParser:
    """Parser of request bodies for one model."""

    def __init__(
        self,
        trained: TrainedModel,
        name: str,
        limits: RequestLimits,
        chat_template: str | None = None,
    ) -> None:
        self.trained, self.name, self.limits = trained, name, limits
        template = chat_template or getattr(trained.tokenizer, "chat_template", None)
        self.has_template = template is not None
        # transformers chooses among several templates of a tokenizer by their names.
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._chat_tokenizer = as_transformers(trained.tokenizer)
        self._encoder = DocumentTokens(trained.tokenizer)

    def completion(self, body: Any) -> Call:
        """Parse a body of /v1/completions.

        Raises:
            BadRequest: A field is wrong. The message names it and the values it may have.
        """
        request = read_body(CompletionBody, body)
        self._check_model(request)
        prompts, texts = self._prompts(request.prompt)
        left = self.trained.max_length - max(map(len, prompts))
        default = max(1, min(16, left, self.limits.new_tokens or left))
        max_tokens = default if request.max_tokens is None else request.max_tokens
        if max_tokens == 0 and not request.echo:
            raise BadRequest("max_tokens must be at least 1 without echo.", "max_tokens")
        scores_prompt = request.echo and request.logprobs is not None
        likeliest = request.logprobs or 0
        requests = self._requests(request, prompts, max_tokens, likeliest, scores_prompt)
        echo: list[str] = []
        if request.echo and not scores_prompt:  # scored tokens of the prompt contain its text
            echo = [self._text(*pair) for pair in zip(texts, prompts)]
        return Call(
            chat=False,
            requests=requests,
            prompts=prompts,
            stream=request.stream,
            include_usage=request.stream_options.include_usage,
            log_probs=request.logprobs is not None,
            echo=echo,
            only_prompt=max_tokens == 0,
        )

    def chat(self, body: Any) -> Call:
        """Parse a body of /v1/chat/completions; see `completion`."""
        request = read_body(ChatBody, body)
        self._check_model(request)
        if request.top_logprobs and not request.logprobs:
            raise BadRequest(
                "top_logprobs needs logprobs. Set logprobs to true or leave top_logprobs out.",
                "top_logprobs",
            )
        prompt = self._chat_prompt(request.messages)
        name, max_tokens = "max_tokens", request.max_tokens
        if request.max_completion_tokens is not None:
            if max_tokens is not None and max_tokens != request.max_completion_tokens:
                raise BadRequest("max_tokens and max_completion_tokens differ. Set one.", name)
            name, max_tokens = "max_completion_tokens", request.max_completion_tokens
        left = self.trained.max_length - len(prompt)
        if max_tokens is None:
            max_tokens = max(1, min(left, self.limits.new_tokens or left))
        if max_tokens == 0:
            raise BadRequest(f"{name} must be at least 1.", name)
        return Call(
            chat=True,
            requests=self._requests(
                request, [prompt], max_tokens, request.top_logprobs, False, name
            ),
            prompts=[prompt],
            stream=request.stream,
            include_usage=request.stream_options.include_usage,
            log_probs=request.logprobs,
        )

    def _check_model(self, request: CompletionBody | ChatBody) -> None:
        if request.model not in (None, self.name):
            raise BadRequest(
                f"This server has no model {request.model!r}. Use {self.name!r}.", "model", 404
            )

    def _prompts(self, value: Any) -> tuple[list[list[int]], list[str | None]]:
        """Return the token ids of the prompts, and their texts, None for prompts of token ids."""
        if isinstance(value, str) or (isinstance(value, list) and _all_integers(value)):
            value = [value]
        if not isinstance(value, list) or not value:
            raise BadRequest(_PROMPT_TYPES, "prompt")
        if len(value) > self.limits.choices:
            raise BadRequest(self._too_many_choices(), "prompt")
        prompts, texts = [], []
        for prompt in value:
            if isinstance(prompt, str):
                prompts.append(self._tokenize(prompt))
            elif isinstance(prompt, list) and _all_integers(prompt):
                prompts.append(prompt)
            else:
                raise BadRequest(_PROMPT_TYPES, "prompt")
            texts.append(prompt if isinstance(prompt, str) else None)
        return prompts, texts

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.has_template:
            raise BadRequest(
                "The model's tokenizer has no chat template. Use /v1/completions, or start the "
                "server with --chat-template."
            )
        conversation = [{"role": m.role, "content": m.text} for m in messages]
        if self._chat_tokenizer is None:
            raise BadRequest(
                "The model's tokenizer cannot encode text. Use /v1/completions with token ids."
            )
        try:
            return prompt_ids(self._chat_tokenizer, conversation, chat_template=self.chat_template)
        except UserError as error:
            raise BadRequest(str(error), "messages") from error

    def _tokenize(self, text: str) -> list[int]:
        try:
            return self._encoder.prompt(text)
        except (ValueError, KeyError) as error:
            raise BadRequest(
                f"The model's tokenizer cannot encode the prompt: {error}", "prompt"
            ) from error

    def _text(self, text: str | None, tokens: list[int]) -> str:
        """Return the text of a prompt, without an incomplete character at its end."""
        if text is not None:
            return text
        detokenizer = detokenizer_of(self.trained.tokenizer)
        return detokenizer.decode(tokens[: len(tokens) - detokenizer.unfinished(tokens)])

    def _requests(
        self,
        request: CompletionBody | ChatBody,
        prompts: list[list[int]],
        max_tokens: int,
        likeliest: int,
        scores_prompt: bool,
        limit_name: str = "max_tokens",
    ) -> list[GenerationRequest]:
        if request.n * len(prompts) > self.limits.choices:
            raise BadRequest(self._too_many_choices(), "n")
        if self.limits.new_tokens is not None and max_tokens > self.limits.new_tokens:
            raise BadRequest(
                f"{limit_name} can be at most {self.limits.new_tokens} on this server.", limit_name
            )
        if request.min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens {request.min_tokens} is above {limit_name} {max_tokens}. Lower it.",
                "min_tokens",
            )
        for prompt in prompts:
            self._check_length(prompt, max(max_tokens, 1), limit_name)
        likeliest = min(likeliest, self.trained.vocab_size)
        seed = secrets.randbelow(2**62) if request.seed is None else request.seed
        sampling = self._sampling(request, max(max_tokens, 1))
        return [
            GenerationRequest(prompt, sampling, seed + i, likeliest, scores_prompt)
            for prompt in prompts
            for i in range(request.n)
        ]

    def _sampling(self, request: CompletionBody | ChatBody, max_tokens: int) -> Sampling:
        vocab = self.trained.vocab_size
        bias = {}
        for name, value in request.logit_bias.items():
            digits = name.lstrip("0") or "0"  # Python converts up to 4300 digits
            is_number = name.isdecimal() and name.isascii() and len(digits) <= len(str(vocab))
            if not (is_number and int(digits) < vocab):
                raise BadRequest(
                    f"logit_bias has the key {name!r:.40}. Keys must be token ids below {vocab}.",
                    "logit_bias",
                )
            bias[int(digits)] = value
        if not all(0 <= token < vocab for token in request.stop_token_ids):
            raise BadRequest(
                f"stop_token_ids must be token ids from 0 to {vocab - 1}.", "stop_token_ids"
            )
        return Sampling(
            max_new_tokens=max_tokens,
            temperature=request.temperature or 1.0,
            top_k=min(max(request.top_k, 0), vocab),
            top_p=request.top_p,
            greedy=request.temperature == 0,
            stop=tuple(request.stop),
            stop_at_eod=not request.ignore_eos,
            min_p=request.min_p,
            min_tokens=request.min_tokens,
            stop_token_ids=tuple(request.stop_token_ids),
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=tuple(bias.items()),
            skip_special_tokens=request.skip_special_tokens,
        )

    def _check_length(self, prompt: list[int], max_tokens: int, limit_name: str) -> None:
        length = self.trained.max_length
        longest = min(self.limits.prompt_tokens or length - 1, length - 1)
        if not prompt:
            raise BadRequest("A prompt must have at least one token.", "prompt")
        if len(prompt) > longest:
            raise BadRequest(
                f"A prompt has {len(prompt)} tokens; at most {longest} fit. Shorten it.", "prompt"
            )
        if len(prompt) + max_tokens > length:
            raise BadRequest(
                f"A prompt of {len(prompt)} tokens and {limit_name} {max_tokens} exceed the "
                f"model's context length of {length}. Lower {limit_name}.",
                limit_name,
            )
        if not all(0 <= token < self.trained.vocab_size for token in prompt):
            raise BadRequest(
                f"A prompt has a token id that is not below {self.trained.vocab_size}.", "prompt"
            )

    def _too_many_choices(self) -> str:
        return f"A request can have at most {self.limits.choices} choices (prompts times n)."


def _all_integers(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)
