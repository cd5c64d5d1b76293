"""Client of one endpoint, with one rule for retries, waits and errors.

httpx is used directly instead of through the openai package: a paid call must be repeated by one
rule, counted by one counter and bounded by one deadline, and openai's client adds its own retries
and parsing to the same httpx. Answers of an endpoint are not trusted: they may be errors, not JSON,
JSON of another shape, endless, or empty.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from alignment.endpoints.endpoint_errors import EndpointError, ErrorKind, error_of_status
from alignment.endpoints.rate_limits import RateLimiter, retry_after
from alignment.endpoints.retry import RetryPolicy
from megatron_ext.errors import TooFewResults, UserError

_LARGEST = 64 << 20  # bytes of an answer
_LONG = 5.0  # shortest wait that is reported, in seconds
_REPORT_INTERVAL = (
    60.0  # seconds between reports of a call that is repeated until its patience ends
)


class CallFailed(Exception):
    """Failure of one call, with its reason as the message.

    Attributes:
        refused: Whether the endpoint refuses this request; otherwise every attempt failed.
    """

    def __init__(self, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class RunCancelled(Exception):
    """Signal that the run ends and begins no further call."""


@dataclass
class EndpointClient:
    """Client of one endpoint.

    Attributes:
        url: Address of the endpoint up to and including /v1.
        http: The connections.
        policy: Limits on the repetition of a failing call.
        limiter: The rate limits, shared by all calls. Default: none.
        sleep: Function that waits between tries; it may raise `RunCancelled`.
        report: Function that shows a sentence to the user, such as the reason of a long wait.
        flag: Flag or key with the address, for error messages.
        advice: Sentence on the fix if the endpoint refuses every request.
        is_permanent: Function that returns whether an error that looks temporary will recur in
            every further attempt.
        before_try: Function that is called before each attempt; an error that it raises ends the
            call.
        retried: Number of failed attempts that were repeated.
        last_fault: Reason of the last of these failures.
    """

    url: str
    http: httpx.AsyncClient
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    limiter: RateLimiter = field(default_factory=lambda: RateLimiter(None, None))
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    report: Callable[[str], None] = print
    flag: str = "--judge"
    advice: str = "Check the address, the name of the model and the key."
    is_permanent: Callable[[EndpointError], Awaitable[bool]] | None = None
    before_try: Callable[[], Awaitable[None]] | None = None
    retried: int = field(default=0, init=False)
    last_fault: str = field(default="", init=False)
    _waits_until: float = field(default=0.0, init=False)

    async def post[T](
        self,
        url: str,
        body: Any,
        read: Callable[[bytes, float | None], T],
        reservation: AbstractAsyncContextManager[Any] | None = None,
    ) -> T:
        """Return the answer to a request.

        A call is repeated only after temporary faults. A received answer is paid for, whatever it
        contains, and is not requested again.

        Args:
            url: The address of the call.
            body: The request, which is sent as JSON.
            read: Function that reads the body of a successful answer. Its second argument is the
                wait that the endpoint requests, in seconds. It may raise `EndpointError`.
            reservation: Part of a budget that each attempt reserves; it may wait. Default: none.

        Raises:
            CallFailed: If this request has no answer.
            UserError: If no request will have an answer: a wrong address, key or model.
            TooFewResults: If the endpoint requests a longer wait than the policy allows.
            RunCancelled: If `sleep` raises it.
        """
        return await self._repeat("POST", url, body, read, reservation)

    async def get[T](self, url: str, read: Callable[[bytes, float | None], T]) -> T:
        """Return what is at an address; see `post`."""
        return await self._repeat("GET", url, None, read, None)

    async def _repeat[T](
        self,
        method: str,
        url: str,
        body: Any,
        read: Callable[[bytes, float | None], T],
        reservation: AbstractAsyncContextManager[Any] | None,
    ) -> T:
        begin, damaged = time.monotonic(), 0
        for attempt in itertools.count():
            await self.limiter.acquire()
            if self.before_try is not None:
                await self.before_try()
            try:
                async with reservation or nullcontext():
                    await self.sleep(0)  # The run may have been cancelled meanwhile.
                    return await self._try(method, url, body, read)
            except EndpointError as error:
                permanent = self.is_permanent is not None and await self.is_permanent(error)
                if error.kind is ErrorKind.FATAL or permanent:
                    raise UserError(
                        f"The endpoint {url} refuses every question with {error}. {self.advice}"
                    ) from None
                if error.kind is ErrorKind.REFUSED:
                    raise CallFailed(str(error), refused=True) from None
                damaged += error.tries is not None
                seconds = time.monotonic() - begin
                last = self.policy.gives_up(attempt + 1, seconds) or damaged == error.tries
                await self._wait(url, attempt, seconds, error, last)
        raise AssertionError("the last attempt raises an error")

    async def _wait(
        self, url: str, attempt: int, elapsed: float, error: EndpointError, last: bool
    ) -> None:
        """Wait before another attempt, or raise a `CallFailed` after the last one."""
        requested = error.seconds or 0.0
        patience = self.policy.patience
        if patience is not None:
            requested = min(requested, patience)
        elif requested > self.policy.max_wait:
            raise TooFewResults(
                f"The endpoint {self.url} requests a wait until {until(requested)}, which is "
                f"{requested:,.0f} seconds ({error}), and --max-wait is {self.policy.max_wait:g}. "
                "Repeat the command then, or raise --max-wait (max_wait in a judge's file)."
            )
        if last:
            tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
            raise CallFailed(f"{error} ({tries})", refused=False)
        self.retried += 1
        self.last_fault = str(error)
        seconds = self.policy.wait(attempt)
        if requested:
            self.limiter.pause(requested, str(error))
        if patience is None:
            self._report_wait(max(requested, seconds), str(error))
        else:
            self._report_patience(url, patience - elapsed, str(error))
        await self.sleep(seconds)

    def _report_wait(self, seconds: float, reason: str) -> None:
        """Report once, for all calls, the reason and the end of a wait."""
        end = time.monotonic() + seconds
        if seconds >= _LONG and end > self._waits_until + 1:
            self._waits_until = end
            self.report(
                f"waiting until {until(seconds)} ({seconds:,.0f} s) for {self.url}: {reason}"
            )

    def _report_patience(self, url: str, seconds: float, reason: str) -> None:
        """Report once a minute, for all calls, the reason and the latest end of a wait."""
        now = time.monotonic()
        if now >= self._waits_until:
            self._waits_until = now + _REPORT_INTERVAL
            self.report(f"waiting for {url} until {until(seconds)} at most: {reason}")

    async def _try[T](
        self, method: str, url: str, body: Any, read: Callable[[bytes, float | None], T]
    ) -> T:
        try:
            async with asyncio.timeout(self.policy.timeout):
                status, headers, content = await self._send(method, url, body)
        except TimeoutError:
            raise EndpointError(
                f"no answer within {self.policy.timeout:g} seconds",
                ErrorKind.PASSING,
                may_be_billed=True,
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise UserError(
                f"{self.flag} {self.url} is not the address of an endpoint "
                f"({str(error).rstrip('.')}). Pass http://HOST:PORT/v1."
            ) from None
        except httpx.HTTPError as error:
            reason = f"no connection: {str(error) or type(error).__name__}"
            reached_server = not isinstance(error, httpx.ConnectError | httpx.PoolTimeout)
            raise EndpointError(reason, ErrorKind.PASSING, may_be_billed=reached_server) from None
        seconds = retry_after(headers.get("retry-after"), time.time())
        if 200 <= status < 300:
            return read(content, seconds)
        if 300 <= status < 400:
            place = headers.get("location", "another address")
            raise EndpointError(f"status {status}, which redirects to {place}", ErrorKind.FATAL)
        raise error_of_status(status, content, seconds)

    async def _send(self, method: str, url: str, body: Any) -> tuple[int, httpx.Headers, bytes]:
        content = bytearray()
        async with self.http.stream(method, url, json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _LARGEST:
                    size = f"an answer of more than {_LARGEST >> 20} MiB"
                    raise EndpointError(size, ErrorKind.REFUSED, may_be_billed=True)
        return response.status_code, response.headers, bytes(content)


def connect(key: str | None, connections: int) -> httpx.AsyncClient:
    """Return the connections to an endpoint.

    They have no timeout of httpx, because the policy of the client bounds every call.

    Args:
        key: The key of the endpoint, or None.
        connections: Maximum number of connections at a time.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits)


def until(seconds: float) -> str:
    """Return the local time after so many seconds."""
    try:
        end = datetime.fromtimestamp(time.time() + seconds).astimezone()
    except (OverflowError, ValueError, OSError):
        return "a time beyond the calendar"
    return f"{end:%H:%M:%S}" if seconds < 12 * 3600 else f"{end:%Y-%m-%d %H:%M %Z}".strip()
