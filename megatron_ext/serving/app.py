"""ASGI application with an OpenAI-compatible API."""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_ext.inference.row import NOT_FINITE
from megatron_ext.serving.bodies import BadRequest
from megatron_ext.serving.openai_protocol import Call, RequestParser
from megatron_ext.serving.openai_responses import CompletionResponse, error
from megatron_ext.serving.replicas import TokenEvent
from megatron_ext.serving.scheduler import Closing, Job, QueueFull, Scheduler

MAX_BODY_BYTES = 8 * 2**20
"""Maximum size of a request body."""

TokenEvents = AsyncGenerator[tuple[int, TokenEvent]]
"""Token events of a call with the indices of their choices, in the order of arrival."""

_CLIENT_CLOSED = 499  # status that nginx logs for a client that disconnected

_FAULT = "The server failed to answer the request. Its log has the cause."


class HTTPError(Exception):
    """Error that ends a request with a status other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        """Return the response that reports the error."""
        content = error(str(self), self.status, self.param)
        return JSONResponse(content, self.status, headers=self.headers)


class Api:
    """Handlers of the routes and their shared state."""

    def __init__(
        self,
        scheduler: Scheduler,
        reader: RequestParser,
        timeout: float,
        body_timeout: float = 30.0,
    ) -> None:
        """Serve one model.

        Args:
            scheduler: Scheduler that runs the model.
            reader: Parser of request bodies.
            timeout: Time limit from a request's arrival to its last token, in seconds.
            body_timeout: Time limit for the arrival of a request's body, in seconds.
        """
        self.scheduler, self.reader = scheduler, reader
        self.timeout, self.body_timeout = timeout, body_timeout
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """Respond to /health with the load; status 503 while the server is closing."""
        scheduler = self.scheduler
        status = "closing" if scheduler.closing else "ok"
        counts = {"running": scheduler.running, "waiting": scheduler.waiting}
        return JSONResponse({"status": status, **counts}, 503 if scheduler.closing else 200)

    async def models(self, request: Request) -> Response:
        """Respond to /v1/models."""
        model = {
            "id": self.reader.name,
            "object": "model",
            "created": self._created,
            "owned_by": "megatron-et",
            "max_model_len": self.reader.trained.max_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """Respond to /v1/completions."""
        return await self._respond(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        """Respond to /v1/chat/completions."""
        return await self._respond(request, self.reader.chat)

    async def _respond(self, request: Request, read: Callable[[Any], Call]) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        body = await self._body(request)
        # Tokenizing a long text takes time, during which other requests are served.
        call = await asyncio.to_thread(read, body)
        completion = CompletionResponse(call, self.reader.name)
        request.state.completion = completion
        events = self._submit(request, call, deadline)
        if call.stream:
            return StreamingResponse(_stream(completion, events), media_type="text/event-stream")
        async with aclosing(events):
            async for index, event in events:
                completion.add(index, event)
        return JSONResponse(completion.whole())

    async def _body(self, request: Request) -> Any:
        data = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                async for part in request.stream():
                    data += part
                    if len(data) > MAX_BODY_BYTES:
                        raise HTTPError(
                            413,
                            f"The body is larger than {MAX_BODY_BYTES} bytes. Send a smaller "
                            "request.",
                        )
        except TimeoutError:
            raise HTTPError(
                408,
                f"The body did not arrive within {self.body_timeout:g} seconds. Send it again.",
            ) from None
        try:
            # Unlike `json`, from_json refuses half surrogate pairs, which no tokenizer can encode.
            return from_json(bytes(data), allow_inf_nan=False)
        except ValueError as error:
            raise BadRequest(f"The body is not valid JSON: {error}") from None

    def _submit(self, request: Request, call: Call, deadline: float) -> TokenEvents:
        """Queue the continuations of a call and return their events.

        Closing the generator cancels unfinished continuations.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, TokenEvent | None]] = asyncio.Queue()

        def deliver_to(index: int) -> Callable[[TokenEvent | None], None]:
            ready: list[tuple[int, TokenEvent | None]] = []

            def deliver(event: TokenEvent | None) -> None:
                ready.append((index, event))
                # Waking the loop takes time of the model's thread; without streaming, once is
                # enough.
                if not call.stream and event is not None and event.finish is None:
                    return
                batch = ready.copy()
                ready.clear()
                try:
                    loop.call_soon_threadsafe(put, batch)
                except RuntimeError:  # the loop has ended, so nothing waits for the event
                    pass

            return deliver

        def put(batch: list[tuple[int, TokenEvent | None]]) -> None:
            for entry in batch:
                arrived.put_nowait(entry)

        jobs = [Job(each, deliver_to(index)) for index, each in enumerate(call.requests)]
        try:
            self.scheduler.submit(jobs)
        except QueueFull:
            raise HTTPError(
                429, "The queue of the server is full. Try again later.", Retry_After="1"
            ) from None
        except Closing:
            raise HTTPError(
                503, "The server is shutting down. Try again later.", Retry_After="5"
            ) from None
        return self._events(request, jobs, arrived, deadline)

    async def _events(
        self,
        request: Request,
        jobs: list[Job],
        arrived: "asyncio.Queue[tuple[int, TokenEvent | None]]",
        deadline: float,
    ) -> TokenEvents:
        disconnected = asyncio.create_task(_disconnected(request))
        unfinished = len(jobs)
        try:
            while unfinished:
                index, event = await self._next(arrived, disconnected, deadline)
                if event is None:
                    raise HTTPError(503, "The server has stopped. Try again later.")
                unfinished -= event.finish is not None
                if event.finish == "failed":
                    raise HTTPError(500, NOT_FINITE)
                yield index, event
        finally:
            disconnected.cancel()
            if unfinished:
                self.scheduler.cancel(jobs)

    async def _next(
        self,
        arrived: "asyncio.Queue[tuple[int, TokenEvent | None]]",
        disconnected: "asyncio.Task[None]",
        deadline: float,
    ) -> tuple[int, TokenEvent | None]:
        if not arrived.empty():
            return arrived.get_nowait()
        coming = asyncio.create_task(arrived.get())
        seconds = deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(
                {coming, disconnected}, timeout=max(0, seconds), return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if disconnected.done():
                raise ClientDisconnect
            raise HTTPError(
                504,
                f"The request was not finished within {self.timeout:g} seconds. Ask for fewer "
                "tokens.",
            )
        finally:
            coming.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(completion: CompletionResponse, events: TokenEvents) -> AsyncIterator[str]:
    """Yield the chunks of a response as server-sent events.

    An error that occurs after the status has been sent is an event, too.
    """
    opened = False
    async with aclosing(events):
        try:
            async for index, event in events:
                chunks = [] if opened else completion.opening()
                opened = True
                for chunk in [*chunks, *completion.add(index, event)]:
                    yield _server_sent(chunk)
        except ClientDisconnect:
            completion.disconnected = True
            return
        except HTTPError as failure:
            yield _server_sent(error(str(failure), failure.status))
            return
        except Exception:
            yield _server_sent(error(_FAULT, 500))
            raise  # for the server's log
    for chunk in completion.closing():
        yield _server_sent(chunk)
    yield "data: [DONE]\n\n"


def _server_sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def make_app(api: Api, key: str | None = None) -> ASGIApp:
    """Return the application.

    Args:
        api: Handlers of the routes.
        key: API key that every route except /health requires. Default: none.
    """
    routes = [
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]

    async def bad(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, BadRequest)
        return HTTPError(raised.status, str(raised), raised.param).response()

    async def failed(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPError)
        return raised.response()

    async def disconnected(request: Request, raised: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED)

    async def fault(request: Request, raised: Exception) -> Response:
        """Respond to an error that no other handler expects; Starlette raises it afterwards."""
        return HTTPError(500, _FAULT).response()

    async def plain(request: Request, raised: Any) -> Response:
        return JSONResponse(error(str(raised.detail), raised.status_code), raised.status_code)

    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        BadRequest: bad,
        HTTPError: failed,
        ClientDisconnect: disconnected,
        404: plain,
        405: plain,
        Exception: fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    return _AccessLog(_KeyCheck(app, key) if key else app)


class _KeyCheck:
    """Middleware that requires the API key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["path"] == "/health" or hmac.compare_digest(header, self._expected):
            await self._app(scope, receive, send)
            return
        failure = HTTPError(
            401,
            "The API key is missing or wrong. Send the server's key as a bearer token.",
            WWW_Authenticate="Bearer",
        )
        await failure.response()(scope, receive, send)


class _AccessLog:
    """Middleware that writes a line to stderr when a request has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, ended = time.perf_counter(), 500, False

        async def send_and_record(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        scope.setdefault("state", {})
        try:
            await self._app(scope, receive, send_and_record)
        except (ClientDisconnect, asyncio.CancelledError):
            status = _CLIENT_CLOSED
            raise
        finally:
            completion: CompletionResponse | None = scope["state"].get("completion")
            if status == 200 and (not ended or (completion and completion.disconnected)):
                status = _CLIENT_CLOSED
            client = (scope.get("client") or ("-",))[0]
            usage = completion.usage if completion else {"prompt_tokens": 0, "completion_tokens": 0}
            print(
                f"{client} {scope['method']} {scope['path']} {status} "
                f"prompt={usage['prompt_tokens']} new={usage['completion_tokens']} "
                f"{time.perf_counter() - start:.3f}s",
                file=sys.stderr,
                flush=True,
            )
