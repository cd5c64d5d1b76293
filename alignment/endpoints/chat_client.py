"""Client of an endpoint with OpenAI's chat API."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from alignment.endpoints.budget import Budget
from alignment.endpoints.client import CallFailed, EndpointClient
from alignment.endpoints.endpoint_errors import EndpointError, load_json
from alignment.endpoints.token_counter import CHARACTERS_PER_TOKEN
from alignment.endpoints.usage import Prices, TokenUsage
from alignment.judges.formats.answers import Answer, read_answer
from alignment.records import Message
from megatron_ext.errors import UserError

# Names of snapshots: gpt-4o-2024-08-06, claude-sonnet-4-20250514, gemini-1.5-pro-002.
_SNAPSHOT = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|\d{6}|\d{4}|\d{3}|latest)$")


@dataclass(frozen=True)
class ChatSampling:
    """Sampling settings of a chat request; a setting that is None is left to the endpoint."""

    temperature: float = 0.0
    max_tokens: int = 8192
    top_p: float | None = None
    top_k: int | None = None
    reasoning_effort: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """Chat request with everything that its answer depends on.

    Attributes:
        model: Name of the model at the endpoint.
        messages: The conversation.
        sampling: Sampling settings of the answer.
        revision: Version of the model, if one name serves several.
        sample: Number of this sample of the same question; it is added to the seed.
        label_log_probs: Whether to request the log-probabilities of the likeliest tokens.
    """

    model: str
    messages: Sequence[Message]
    sampling: ChatSampling
    revision: str = ""
    sample: int = 0
    label_log_probs: bool = False

    def body(self) -> dict[str, Any]:
        """Return the body of the HTTP request."""
        sampling = {
            name: value for name, value in asdict(self.sampling).items() if value is not None
        }
        if self.sampling.seed is not None:
            sampling["seed"] = self.sampling.seed + self.sample
        scores = {"logprobs": True, "top_logprobs": 20} if self.label_log_probs else {}
        messages = [asdict(message) for message in self.messages]
        return {"model": self.model, "messages": messages, **sampling, **scores}

    @property
    def key(self) -> str:
        """Return a hash of everything that the answer depends on, without the address."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass
class ChatClient(EndpointClient):
    """Client of an endpoint with OpenAI's chat API.

    Attributes:
        budget: The budget of the calls. Default: one without a limit.
        models: Number of answers of each model, by the names that the endpoint returns.
    """

    budget: Budget = field(default_factory=lambda: Budget(Prices()))
    models: Counter[str] = field(default_factory=Counter, init=False)
    _context: int | None = field(default=None, init=False)  # 0: the endpoint does not state it
    _reported_context: bool = field(default=False, init=False)

    async def ask(self, request: ChatRequest) -> Answer:
        """Return the answer to a request; see `EndpointClient.post` for further errors.

        An answer is limited to what its prompt leaves of the model's context, if the endpoint
        states the context, as vLLM does.

        Raises:
            BudgetSpent: The call does not fit into the budget.
        """
        limit = request.sampling.max_tokens
        if not self._context or limit < self._context:
            try:
                return await self._ask(request, {})
            except CallFailed as error:
                if not error.refused or not await self._find_context(request):
                    raise
                changes = await self._fitting_limit(request)
                if changes == {"max_tokens": limit}:
                    raise
        else:
            changes = await self._fitting_limit(request)
        return await self._ask(request, changes)

    async def _ask(self, request: ChatRequest, changes: dict[str, int | None]) -> Answer:
        reservation = self.budget.reserve(request.messages, request.sampling.max_tokens)

        def read(content: bytes, seconds: float | None) -> Answer:
            answer = read_answer(content, request.label_log_probs, seconds)
            reservation.answered(TokenUsage.of(answer))
            return answer

        url = f"{self.url}/chat/completions"
        body = {k: v for k, v in (request.body() | changes).items() if v is not None}
        answer = await self.post(url, body, read, reservation)
        self.limiter.count_tokens(_tokens(request, answer))
        self._count_model(request.model, answer.model)
        return answer

    async def _find_context(self, request: ChatRequest) -> bool:
        """Return whether the endpoint states a context that an answer may exceed."""
        if self._context is None:
            answer = await self._control("GET", f"{self.url}/models", None)
            models = answer.get("data") if isinstance(answer, dict) else None
            lengths = {
                str(model.get("id")): model.get("max_model_len")
                for model in (models if isinstance(models, list) else [])
                if isinstance(model, dict)
            }
            length = lengths.get(request.model)
            self._context = length if isinstance(length, int) else 0
        return self._context > 0

    async def _fitting_limit(self, request: ChatRequest) -> dict[str, int | None]:
        """Return the limit of an answer that fits into the context, for the body of the request.

        Raises:
            CallFailed: The prompt leaves no room for an answer.
        """
        limit, context = request.sampling.max_tokens, self._context
        assert context
        messages = [asdict(message) for message in request.messages]
        body = {"model": request.model, "messages": messages}
        answer = await self._control("POST", f"{self.url.removesuffix('/v1')}/tokenize", body)
        count = answer.get("count") if isinstance(answer, dict) else None
        if isinstance(count, int) and count >= context:
            raise CallFailed(
                f"the prompt has {count:,} tokens, and the context of {request.model} has "
                f"{context:,}",
                refused=True,
            )
        if isinstance(count, int) and count + limit <= context:
            return {"max_tokens": limit}
        if not self._reported_context:
            self._reported_context = True
            self.report(
                f"{self.url} serves {context:,} tokens of a prompt with its answer, so that "
                f"answers to long prompts are limited to fewer than {limit:,} tokens."
            )
        # A server without /tokenize gives an answer without a limit what the prompt leaves.
        return {"max_tokens": context - count if isinstance(count, int) else None}

    async def _control(self, method: str, url: str, body: Any) -> Any:
        """Return the JSON value at a route that not every endpoint has, or None."""
        try:
            return await self._try(method, url, body, lambda content, _: load_json(content))
        except (EndpointError, UserError, ValueError):
            return None

    def _count_model(self, requested: str, answered: str) -> None:
        if not answered:
            return
        self.models[answered] += 1
        if self.models[answered] == 1 and not same_model(requested, answered):
            self.report(
                f"warning: {self.url} was called for the model {requested!r} and answers as "
                f"{answered!r}. Check that it serves the right model."
            )


def same_model(requested: str, answered: str) -> bool:
    """Return whether two names may mean one model: a snapshot of it, or a name with its owner."""
    names, snapshots = [], []
    for name in (requested, answered):
        name = name.strip("/").lower()
        base = _SNAPSHOT.sub("", name)
        names.append(base)
        snapshots.append(name[len(base) + 1 :])
    if len({"/" in name for name in names}) > 1:
        names = [name.rpartition("/")[2] for name in names]
    return names[0] == names[1] and len({*snapshots} - {"", "latest"}) < 2


def _tokens(request: ChatRequest, answer: Answer) -> int:
    """Return the tokens of a call, estimated if the endpoint does not count them."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    if prompt is None:
        prompt = sum(len(message.content) for message in request.messages) // CHARACTERS_PER_TOKEN
    if completion is None:
        completion = len(answer.thinking + answer.text) // CHARACTERS_PER_TOKEN
    return prompt + completion
