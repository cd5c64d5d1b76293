"""Calls of an endpoint that speaks OpenAI's chat API, whatever it does.

httpx rather than the openai package: a call that is paid for must be tried again by one rule, seen
by one counter and bounded by one deadline, and openai's client has retries and parsing of its own
around the same httpx. What an endpoint sends is not trusted: it may be an error, not JSON, JSON of
another shape, endless, or nothing at all.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import httpx

from alignment.endpoints.endpoint_errors import EndpointError, Kind, error_of_status
from alignment.endpoints.rate_limits import Pace, back_off, retry_after
from alignment.judges.formats.answers import Answer, read_answer
from alignment.records import Message
from megatron_ext.errors import TooFewResults, UserError

MAX_WAIT = 600.0  # seconds
_LARGEST = 64 << 20  # bytes of an answer
_LONG = 5.0  # seconds of a wait that is reported
_CHARACTERS = 4  # in a token, about, where an endpoint does not count tokens
# Names of snapshots: gpt-4o-2024-08-06, claude-sonnet-4-20250514, gemini-1.5-pro-002.
_SNAPSHOT = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|\d{6}|\d{4}|\d{3}|latest)$")


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


@dataclass
class Client:
    """Client of one endpoint.

    Attributes:
        url: up to and with /v1.
        pace: shared by all calls.
        sleep: waits between tries; may raise `Stopped`.
        timeout: seconds for one try, from connecting to the last byte.
        tries: calls made for one request at most.
        first_wait: see `back_off`.
        max_wait: the longest wait, in seconds, that the endpoint may ask for.
        report: shows a sentence to the user: a long wait, an answer of another model.
        retried: how many tries failed and were made again.
        last_fault: the last of them, in words.
        models: how many answers each model gave, by the endpoint's names.
    """

    url: str
    http: httpx.AsyncClient
    pace: Pace
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    timeout: float = 600.0
    tries: int = 7
    first_wait: float = 1.0
    max_wait: float = MAX_WAIT
    report: Callable[[str], None] = print
    retried: int = field(default=0, init=False)
    last_fault: str = field(default="", init=False)
    models: Counter[str] = field(default_factory=Counter, init=False)
    _waits_until: float = field(default=0.0, init=False)

    async def ask(self, request: Request) -> Answer:
        """Return the answer to a request.

        Only faults that may pass are tried again. An answer that was given, whatever it holds, is
        paid for, and a further one is not asked for, at any temperature.

        Raises:
            CallFailed: there is none to this request.
            UserError: there will be none to any request: a wrong address, key or model.
            TooFewResults: the endpoint asks for a longer wait than `max_wait`.
            Stopped: as `sleep` says.
        """
        torn = 0
        for attempt in range(self.tries):
            await self.pace.turn()
            await self.sleep(0)  # the run may have been stopped meanwhile
            try:
                answer = await self._try(request)
            except EndpointError as error:
                if error.kind is Kind.FATAL:
                    raise UserError(
                        f"the endpoint {self.url} refuses every question with {error}"
                    ) from None
                if error.kind is Kind.REFUSED:
                    raise CallFailed(str(error), refused=True) from None
                torn += error.tries is not None
                last = attempt + 1 == self.tries or torn == error.tries
                await self._wait(attempt, error, last)
            else:
                self.pace.used(_tokens(request, answer))
                self._count(request.model, answer.model)
                return answer
        raise AssertionError("the last try raises")

    async def _wait(self, attempt: int, error: EndpointError, last: bool) -> None:
        """Wait before another try, or raise a `CallFailed` after the last one."""
        asked = error.seconds or 0.0
        if asked > self.max_wait:
            raise TooFewResults(
                f"the endpoint {self.url} asks to wait until {until(asked)}, which is {asked:,.0f} "
                f"seconds ({error}), and --max-wait is {self.max_wait:g}: repeat the command then, "
                "or raise --max-wait (max_wait in a judge's file)"
            )
        if last:
            tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
            raise CallFailed(f"{error} ({tries})", refused=False)
        self.retried += 1
        self.last_fault = str(error)
        seconds = back_off(attempt, self.first_wait)
        if asked:
            self.pace.hold(asked, str(error))
        self._report_wait(max(asked, seconds), str(error))
        await self.sleep(seconds)

    def _report_wait(self, seconds: float, reason: str) -> None:
        """Say once for what all calls wait, and until when."""
        end = time.monotonic() + seconds
        if seconds >= _LONG and end > self._waits_until + 1:
            self._waits_until = end
            self.report(
                f"waiting until {until(seconds)} ({seconds:,.0f} s) for {self.url}: {reason}"
            )

    def _count(self, asked: str, answered: str) -> None:
        if not answered:
            return
        self.models[answered] += 1
        if self.models[answered] == 1 and not same_model(asked, answered):
            self.report(
                f"warning: {self.url} was asked for the model {asked!r} and answers as "
                f"{answered!r}: check that it serves the right one"
            )

    async def _try(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self.timeout):
                status, headers, content = await self._post(request.body())
        except TimeoutError:
            raise EndpointError(
                f"no answer within {self.timeout:g} seconds", Kind.PASSING
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise UserError(f"--judge {self.url} is no address of an endpoint: {error}") from None
        except httpx.HTTPError as error:
            reason = f"no connection: {str(error) or type(error).__name__}"
            raise EndpointError(reason, Kind.PASSING) from None
        seconds = retry_after(headers.get("retry-after"), time.time())
        if 200 <= status < 300:
            return read_answer(content, request.label_log_probs, seconds)
        if 300 <= status < 400:
            place = headers.get("location", "another address")
            raise EndpointError(f"status {status}, which redirects to {place}", Kind.FATAL)
        raise error_of_status(status, content, seconds)

    async def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        content = bytearray()
        async with self.http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _LARGEST:
                    size = f"an answer of more than {_LARGEST >> 20} MiB"
                    raise EndpointError(size, Kind.REFUSED)
        return response.status_code, response.headers, bytes(content)


def connect(key: str | None, connections: int) -> httpx.AsyncClient:
    """The connections to an endpoint; `ask`'s timeout bounds everything on them."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits)


def same_model(asked: str, answered: str) -> bool:
    """Return whether a model's name may stand for another: a snapshot, or a name with its owner."""
    names, snapshots = [], []
    for name in (asked, answered):
        name = name.strip("/").lower()
        base = _SNAPSHOT.sub("", name)
        names.append(base)
        snapshots.append(name[len(base) + 1 :])
    if len({"/" in name for name in names}) > 1:
        names = [name.rpartition("/")[2] for name in names]
    return names[0] == names[1] and len({*snapshots} - {"", "latest"}) < 2


def until(seconds: float) -> str:
    """Return the local time after so many seconds."""
    try:
        end = datetime.fromtimestamp(time.time() + seconds).astimezone()
    except (OverflowError, ValueError, OSError):
        return "a time beyond all calendars"
    return f"{end:%H:%M:%S}" if seconds < 12 * 3600 else f"{end:%Y-%m-%d %H:%M %Z}".strip()


def _tokens(request: Request, answer: Answer) -> int:
    """Return the tokens of a call, estimated where the endpoint does not count them."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    if prompt is None:
        prompt = sum(len(message.content) for message in request.messages) // _CHARACTERS
    if completion is None:
        completion = len(answer.thinking + answer.text) // _CHARACTERS
    return prompt + completion
