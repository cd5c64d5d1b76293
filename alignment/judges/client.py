"""Asking an endpoint that speaks OpenAI's chat API, whatever it does.

httpx rather than the openai package: a call that is paid for must be tried again by one rule, seen
by one counter and bounded by one deadline, and openai's client has retries and parsing of its own
around the same httpx. What an endpoint sends is not trusted: it may be an error, not JSON, JSON of
another shape, endless, or nothing at all.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from alignment.judges.pacing import Pace, back_off, retry_after
from alignment.records import Message
from megatron_ext.errors import UserError

# A second try may help, as after any error of a server or proxy; of all else the next answer would
# be the same.
_AGAIN = {408, 409, 425, 429}
# Nothing that is asked of this endpoint under this name and key will be answered.
_HOPELESS = {401, 402, 403, 404, 405, 410, 501}
_LARGEST = 64 << 20  # bytes of an answer
DIGITS = "0123456789"
_IMPOSSIBLE = -700.0  # a log-probability whose exponential is 0; vLLM writes -inf as -9999


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; what is None is left to the endpoint."""

    temperature: float = 0.0
    max_tokens: int = 8192
    top_p: float | None = None
    top_k: int | None = None
    reasoning_effort: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """All that an answer depends on.

    Attributes:
        revision: of the model, where its name does not tell: a checkpoint's hash, say.
        sample: which of several answers to the same question; with a seed in `sampling`, it is
            added to it.
        label_log_probs: ask for the log-probabilities of the likeliest tokens.
    """

    model: str
    messages: Sequence[Message]
    sampling: Sampling
    revision: str = ""
    sample: int = 0
    label_log_probs: bool = False

    def body(self) -> dict[str, Any]:
        """What is posted."""
        drawn = {name: value for name, value in asdict(self.sampling).items() if value is not None}
        if self.sampling.seed is not None:
            drawn["seed"] = self.sampling.seed + self.sample
        scores = {"logprobs": True, "top_logprobs": 20} if self.label_log_probs else {}
        messages = [asdict(message) for message in self.messages]
        return {"model": self.model, "messages": messages, **drawn, **scores}


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        thinking: where the endpoint tells it apart from the text.
        finish: why the text ends; "length" is a text that was cut off.
        labels: for each token that is a digit alone, the digit, and the log-probability of every
            digit among the likeliest tokens there; None where the endpoint gave none.
    """

    text: str
    thinking: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    labels: list[tuple[str, dict[str, float]]] | None = None

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Answer":
        return cls(**row)


class CallFailed(Exception):
    """There is no answer, for the reason given.

    Attributes:
        refused: the endpoint will not answer this request; else it failed in every try.
    """

    def __init__(self, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class Stopped(Exception):
    """The run is to end: no call is begun any more."""


class _TryAgain(Exception):
    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass
class Client:
    """Asks one endpoint.

    Attributes:
        url: up to and with /v1.
        pace: shared by all calls.
        sleep: waits between tries; may raise `Stopped`.
        timeout: seconds for one try, from connecting to the last byte.
        tries: calls made for one request at most.
        first_wait: see `back_off`.
        retried: how many tries failed and were made again.
    """

    url: str
    http: httpx.AsyncClient
    pace: Pace
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    timeout: float = 600.0
    tries: int = 7
    first_wait: float = 1.0
    retried: int = field(default=0, init=False)

    async def ask(self, request: Request) -> Answer:
        """The answer.

        Raises:
            CallFailed: there is none to this request.
            UserError: there will be none to any: a wrong address, key or model.
            Stopped: as `sleep` says.
        """
        reason = ""
        for attempt in range(self.tries):
            await self.pace.turn()
            await self.sleep(0)  # the run may have been stopped meanwhile
            try:
                answer = await self._try(request)
            except _TryAgain as error:
                reason = str(error)
                if attempt + 1 == self.tries:
                    break
                self.retried += 1
                if error.seconds is not None:
                    self.pace.hold(error.seconds)
                await self.sleep(back_off(attempt, self.first_wait))
            else:
                self.pace.used(answer.prompt_tokens + answer.completion_tokens)
                return answer
        raise CallFailed(f"{reason} ({self.tries} tries)", refused=False)

    async def _try(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self.timeout):
                status, headers, content = await self._post(request.body())
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.timeout:g} seconds") from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise UserError(f"--judge {self.url} is no address of an endpoint: {error}") from None
        except httpx.HTTPError as error:
            raise _TryAgain(f"no connection: {str(error) or type(error).__name__}") from None
        if status == 200:
            return read_answer(content, request.label_log_probs)
        said = f"status {status}: {_message(content)}"
        if status in _HOPELESS:
            raise UserError(f"--judge {self.url} refuses every question with {said}")
        if status in _AGAIN or status >= 500:
            raise _TryAgain(said, retry_after(headers.get("retry-after"), time.time()))
        raise CallFailed(said, refused=True)

    async def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        content = bytearray()
        async with self.http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _LARGEST:
                    raise _TryAgain(f"an answer of more than {_LARGEST >> 20} MiB")
        return response.status_code, response.headers, bytes(content)


def connect(key: str | None, connections: int) -> httpx.AsyncClient:
    """The connections to an endpoint; `ask`'s timeout bounds everything on them."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits)


def read_answer(content: bytes, log_probs: bool = False) -> Answer:
    """The answer in a body of status 200.

    Raises:
        _TryAgain: it is something else.
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text, usage = message.get("content") or "", body.get("usage") or {}
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(thinking, str):
            raise TypeError("content is not text")
        text.encode(), thinking.encode()  # JSON can hold halves of characters
        return Answer(
            text=text,
            thinking=thinking,
            finish=str(choice.get("finish_reason") or ""),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            labels=_labels(choice.get("logprobs")) if log_probs else None,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _TryAgain(f"not an answer of the chat API: {error!r:.100}") from None


def _labels(given: Any) -> list[tuple[str, dict[str, float]]] | None:
    if not given or not given.get("content"):
        return None
    labels = []
    for position in given["content"]:
        digit = position["token"].strip()
        if len(digit) == 1 and digit in DIGITS and (log_probs := _digits(position)):
            labels.append((digit, log_probs))
    return labels


def _digits(position: Mapping[str, Any]) -> dict[str, float]:
    """Log-probability of each digit; " 7" and "7" are the same label."""
    likeliest = {(entry["token"], float(entry["logprob"])) for entry in position["top_logprobs"]}
    likeliest.add((position["token"], float(position["logprob"])))
    found: dict[str, float] = {}
    for token, value in dict(likeliest).items():
        digit = token.strip()
        if len(digit) == 1 and digit in DIGITS and value > _IMPOSSIBLE:
            found[digit] = math.log(math.exp(found.get(digit, -math.inf)) + math.exp(value))
    return found


def expected_score(answer: Answer, label: float) -> float:
    """The sum of x p(x) over labels 0 to 9, renormalised among themselves, where the label stands.

    Args:
        label: which was read from the text; the last token that is this digit alone is its place.

    Raises:
        LookupError: no token is the label alone.
    """
    for digit, log_probs in reversed(answer.labels or []):
        if digit == f"{label:.0f}":
            total = sum(map(math.exp, log_probs.values()))
            return sum(int(x) * math.exp(p) for x, p in log_probs.items()) / total
    raise LookupError("no token of the answer is the label alone")


def _message(content: bytes) -> str:
    """What an error says of itself, shortened."""
    try:
        error = json.loads(content)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content.decode(errors="replace")
    return " ".join(str(text).split())[:200] or "nothing said"
