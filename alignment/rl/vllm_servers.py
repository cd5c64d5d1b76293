"""Calls of the vLLM servers that sample rollouts, and the patience with them."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch.distributed as dist

from alignment.endpoints.api_key import read_api_key
from alignment.endpoints.client import CallFailed, EndpointClient, connect
from alignment.endpoints.endpoint_errors import EndpointError, ErrorKind, load_json
from alignment.endpoints.retry import RetryPolicy
from alignment.polling import run_async_while_polling
from megatron_ext.console import console
from megatron_ext.errors import UserError

ADVICE = "Start vLLM as docs/how-to/vllm.md describes."
API_KEY_VARIABLE = "MEGATRON_ET_ROLLOUT_API_KEY"
"""Environment variable that holds the key of the servers."""
_WAIT = 2.0  # seconds between tries
RESUME_SECONDS = 2.0
"""Seconds in which a server must resume after a failure, before the failure is reported."""
_REPORT_INTERVAL = 60.0  # seconds between reports of a slow call


class ServerRefused(UserError):
    """Answer of a server that a repetition of the request would get again."""


class VLLMServer:
    """Connection to one server, for one event loop.

    Attributes:
        url: Address up to and including /v1.
        root: Address without /v1, where the routes are that control the server.
        lost: Whether the server did not exist at a call of this connection.
    """

    def __init__(
        self,
        url: str,
        http: httpx.AsyncClient,
        patience: float,
        lost: set[str],
        before_try: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Make a connection.

        Args:
            url: Address up to and including /v1.
            http: Connections that carry the key.
            patience: Seconds to wait for a server that does not answer.
            lost: Addresses of servers that did not exist at a call; this one is added if so.
            before_try: Function that is called before each try of a call.
        """
        self.url, self.root, self.patience = url, url.removesuffix("/v1"), patience
        self.lost, self._all_lost = False, lost
        wait = min(_WAIT, patience / 4)
        self._client = EndpointClient(
            url,
            http,
            RetryPolicy(patience=patience, timeout=None, first_wait=wait, longest_wait=wait),
            report=console.warn,
            flag="--rollout-url",
            advice=ADVICE,
            is_permanent=self._is_permanent,
            before_try=before_try,
        )

    async def post[T](
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[bytes, float | None], T] | None = None,
    ) -> T | Any:
        """Return the answer to a request, after waiting for a server that is not available or busy.

        Args:
            path: Path of the route, such as /v1/completions or /collective_rpc.
            body: The request, which is sent as JSON.
            read: Function that reads the body of a successful answer; see `EndpointClient.post`.
                Default: the JSON value, or None for an empty body.

        Raises:
            ServerRefused: The server refuses.
            UserError: It does not answer within the patience.
        """
        return await self._call(
            path, self._client.post(f"{self.root}{path}", body, read or read_json)
        )

    async def get(self, path: str) -> Any:
        """Return the JSON value at a path; see `post`."""
        return await self._call(path, self._client.get(f"{self.root}{path}", read_json))

    async def _call[T](self, path: str, call: Awaitable[T]) -> T:
        try:
            return await call
        except CallFailed as error:
            if error.refused:
                raise ServerRefused(
                    f"The endpoint {self.root}{path} refuses with {error}. {ADVICE}"
                ) from None
            raise self._no_answer(str(error)) from None
        except UserError as error:  # an error that every repetition would get
            raise ServerRefused(str(error)) from None

    async def while_healthy[T](self, work: Awaitable[T], doing: Callable[[], str] = str) -> T:
        """Return the result of a call, however slow, while the server passes health checks.

        Args:
            work: The call.
            doing: Function that returns what the server is doing, which is shown once a minute.
                Default: nothing is shown.
        """
        task = asyncio.ensure_future(work)
        last_sign, interval = time.monotonic(), min(self.patience / 10, _REPORT_INTERVAL)
        next_report = last_sign + _REPORT_INTERVAL
        try:
            async with httpx.AsyncClient(timeout=interval) as http:
                while not (await asyncio.wait([task], timeout=interval))[0]:
                    try:
                        response = await http.get(f"{self.root}/health")
                        reason = f"its health check returned status {response.status_code}"
                        if response.status_code < 500:
                            last_sign = time.monotonic()
                    except (httpx.HTTPError, httpx.InvalidURL) as error:
                        reason = str(error) or type(error).__name__
                    if time.monotonic() - last_sign > self.patience:
                        raise self._no_answer(reason)
                    if (now := time.monotonic()) >= next_report and (text := doing()):
                        next_report = now + _REPORT_INTERVAL
                        console.line(f"{self.url} {text}")
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def pause(self) -> None:
        """Abort the requests of others, and let new ones wait until `resume`.

        A request during a change of weights would mix old keys and values with new weights.
        """
        await self.while_healthy(self.post("/pause?mode=abort", {}), lambda: "pauses")

    async def resume(self) -> None:
        """Let the server answer requests again."""
        await self.while_healthy(self.post("/resume", {}))

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, which has keys and values of the old weights.

        Raises:
            UserError: The server does not empty it, because it answers other requests.
        """
        begin = time.monotonic()
        while True:
            answer = await self.while_healthy(self.post("/reset_prefix_cache", {}))
            if not isinstance(answer, dict) or answer.get("success") is not False:
                return
            if time.monotonic() - begin > self.patience:
                raise UserError(
                    f"{self.root} has not emptied its prefix cache for {self.patience:.0f} s, and "
                    "would answer with the old weights. Let nothing else send it requests, then "
                    "repeat the command, which resumes."
                )
            await asyncio.sleep(min(_WAIT, self.patience / 4))

    async def _is_permanent(self, error: EndpointError) -> bool:
        # A server whose engine has died fails its health checks; one that passes them will answer
        # the same request with the same error.
        healthy = error.status == 500 and await self._is_healthy()
        if error.status in (None, 500) and not healthy:
            self.lost = True
            self._all_lost.add(self.url)
        return healthy

    async def _is_healthy(self) -> bool:
        try:
            async with httpx.AsyncClient(timeout=self.patience / 10) as http:
                return (await http.get(f"{self.root}/health")).status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def _no_answer(self, reason: str) -> UserError:
        return UserError(
            f"{self.url} has not answered for {self.patience:.0f} s ({reason}). Check the server, "
            "then repeat the command, which resumes."
        )


class VLLMServers:
    """Addresses of all servers.

    Attributes:
        lost: Addresses of servers that did not exist at a call of this rank: a server that comes
            back there may have other weights.
    """

    def __init__(self, urls: Sequence[str], patience: float, check: Callable[[], None]) -> None:
        """Name the servers.

        Args:
            urls: Addresses, up to and including /v1.
            patience: Seconds to wait for a server that does not answer.
            check: Function that all ranks call while they wait. It may raise on all of them.
        """
        self.urls = [url.rstrip("/") for url in urls]
        self.patience, self.check = patience, check
        self.lost: set[str] = set()

    @asynccontextmanager
    async def connect(
        self,
        url: str,
        connections: int = 1,
        before_try: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[VLLMServer]:
        """Connect to a server with the key in MEGATRON_ET_ROLLOUT_API_KEY, if it is set.

        Args:
            url: Address of the server.
            connections: Most calls at a time.
            before_try: Function that is called before each try of a call.
        """
        async with connect(read_api_key(API_KEY_VARIABLE), connections) as http:
            yield VLLMServer(url, http, self.patience, self.lost, before_try)

    def call(
        self,
        work: Callable[[VLLMServer], Awaitable[None]],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Call all servers at the same time from rank 0; a collective.

        Args:
            work: Calls of one server, without collectives.
            meanwhile: Function, such as a collective, that all ranks call while the calls are under
                way, before they wait for them.

        Raises:
            UserError: The first error of a server, on all ranks.
        """
        problem: list[str | None] = [None]
        try:
            calls = (lambda: self._call_all(work)) if dist.get_rank() == 0 else None
            run_async_while_polling(calls, self.check, meanwhile)
        except UserError as error:
            problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise UserError(problem[0])

    def resume_after_failure(self) -> None:
        """Let paused servers answer again if they do so at once; rank 0 alone calls them.

        Requests to a server that stays paused would hang.
        """
        if dist.get_rank() == 0:
            resume = self._call_all(lambda server: server.resume())
            with suppress(UserError, TimeoutError):
                asyncio.run(asyncio.wait_for(resume, RESUME_SECONDS))

    async def _call_all(self, work: Callable[[VLLMServer], Awaitable[None]]) -> None:
        async def call(url: str) -> None:
            async with self.connect(url) as server:
                await work(server)

        tasks = [asyncio.create_task(call(url)) for url in self.urls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def warn_of_public_address(urls: Sequence[str]) -> None:
    """Warn of addresses that may be reached from other networks; see `VLLMServers` for them.

    vLLM does not protect the routes that load weights by its key.
    """
    for url in urls:
        try:
            parts = urlsplit(url)
            places = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except (ValueError, OSError):
            continue  # the first call reports it
        if any(ip_address(str(place[4][0]).partition("%")[0]).is_global for place in places):
            console.warn(
                f"--rollout-url {url} is no address of a private network. The routes by which a "
                "server loads weights require no key: let only this machine and its cluster reach "
                "them."
            )


def read_json(content: bytes, _: float | None = None) -> Any:
    """Return the JSON value of a response body, or None if it is empty.

    Raises:
        EndpointError: The body is not JSON.
    """
    if not content:
        return None
    try:
        return load_json(content)
    except ValueError as error:
        raise EndpointError(f"an answer is not JSON: {error}", ErrorKind.PASSING) from None
