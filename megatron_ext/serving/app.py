"""The HTTP side: an ASGI application in the manner of OpenAI's API."""

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

from megatron_ext.serving.bodies import BadRequest
from megatron_ext.serving.openai_answers import CompletionResponse, error
from megatron_ext.serving.openai_protocol import Call, Reader
from megatron_ext.serving.replicas import TokenEvent
from megatron_ext.serving.scheduler import Closing, Job, QueueFull, Scheduler

MOST_BYTES = 8 * 2**20
"""The largest body that is read."""

Pieces = AsyncGenerator[tuple[int, TokenEvent]]
"""Tokens of the choices of a call, by their index, as they come."""

_GONE = 499  # what access logs write for a client that left, by nginx's custom


class Refusal(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> Response:
        content = error(str(self), self.status, self.param)
        return JSONResponse(content, self.status, headers=self.headers)


class Api:
    """What the routes share."""

    def __init__(
        self, scheduler: Scheduler, reader: Reader, timeout: float, body_timeout: float = 30.0
    ) -> None:
        """Serve one model.

        Args:
            timeout: seconds from a request's arrival to its last token.
            body_timeout: seconds in which a request's body must have arrived.
        """
        self.scheduler, self.reader = scheduler, reader
        self.timeout, self.body_timeout = timeout, body_timeout
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        scheduler = self.scheduler
        status = "closing" if scheduler.closing else "ok"
        counts = {"running": scheduler.running, "waiting": scheduler.waiting}
        return JSONResponse({"status": status, **counts}, 503 if scheduler.closing else 200)

    async def models(self, request: Request) -> Response:
        model = {
            "id": self.reader.name,
            "object": "model",
            "created": self._created,
            "owned_by": "megatron-et",
            "max_model_len": self.reader.trained.max_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def _answer(self, request: Request, read: Callable[[Any], Call]) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        body = await self._body(request)
        # Tokenizing a long text takes a while, in which others are served.
        call = await asyncio.to_thread(read, body)
        answer = CompletionResponse(call, self.reader.name)
        request.state.answer = answer
        pieces = self._submit(request, call, deadline)
        if call.stream:
            return StreamingResponse(_events(answer, pieces), media_type="text/event-stream")
        async with aclosing(pieces):
            async for index, piece in pieces:
                answer.add(index, piece)
        return JSONResponse(answer.whole())

    async def _body(self, request: Request) -> Any:
        data = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                async for part in request.stream():
                    data += part
                    if len(data) > MOST_BYTES:
                        raise Refusal(413, f"a body has at most {MOST_BYTES} bytes")
        except TimeoutError:
            raise Refusal(408, "the request's body did not arrive in time") from None
        try:
            # Unlike `json`, it refuses halves of characters, which no tokenizer can read.
            return from_json(bytes(data), allow_inf_nan=False)
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None

    def _submit(self, request: Request, call: Call, deadline: float) -> Pieces:
        """Queue a call's continuations; what comes of them, as it comes.

        Whoever stops reading gives them up.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, TokenEvent | None]] = asyncio.Queue()

        def to(index: int) -> Callable[[TokenEvent | None], None]:
            ready: list[tuple[int, TokenEvent | None]] = []

            def deliver(piece: TokenEvent | None) -> None:
                ready.append((index, piece))
                # Waking the loop costs the model's thread time: for a whole answer once is enough.
                if not call.stream and piece is not None and piece.finish is None:
                    return
                batch = ready.copy()
                ready.clear()
                try:
                    loop.call_soon_threadsafe(put, batch)
                except RuntimeError:  # the loop has ended, nobody waits
                    pass

            return deliver

        def put(batch: list[tuple[int, TokenEvent | None]]) -> None:
            for entry in batch:
                arrived.put_nowait(entry)

        jobs = [Job(work, to(index)) for index, work in enumerate(call.works)]
        try:
            self.scheduler.submit(jobs)
        except QueueFull:
            raise Refusal(429, "too many requests wait: try again", Retry_After="1") from None
        except Closing:
            raise Refusal(503, "the server is about to end", Retry_After="5") from None
        return self._pieces(request, jobs, arrived, deadline)

    async def _pieces(
        self,
        request: Request,
        jobs: list[Job],
        arrived: "asyncio.Queue[tuple[int, TokenEvent | None]]",
        deadline: float,
    ) -> Pieces:
        gone = asyncio.create_task(_disconnected(request))
        left = len(jobs)
        try:
            while left:
                index, piece = await self._next(arrived, gone, deadline)
                if piece is None:
                    raise Refusal(503, "the server has ended")
                left -= piece.finish is not None
                yield index, piece
        finally:
            gone.cancel()
            if left:
                self.scheduler.cancel(jobs)

    async def _next(
        self,
        arrived: "asyncio.Queue[tuple[int, TokenEvent | None]]",
        gone: "asyncio.Task[None]",
        deadline: float,
    ) -> tuple[int, TokenEvent | None]:
        if not arrived.empty():
            return arrived.get_nowait()
        coming = asyncio.create_task(arrived.get())
        seconds = deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(
                {coming, gone}, timeout=max(0, seconds), return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if gone.done():
                raise ClientDisconnect
            raise Refusal(504, f"not done within {self.timeout:g} seconds")
        finally:
            coming.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answer: CompletionResponse, pieces: Pieces) -> AsyncIterator[str]:
    """The chunks of an answer as server-sent events; an error that comes too late for a status is
    one too."""
    opened = False
    async with aclosing(pieces):
        try:
            async for index, piece in pieces:
                chunks = [] if opened else answer.opening()
                opened = True
                for chunk in [*chunks, *answer.add(index, piece)]:
                    yield _event(chunk)
        except ClientDisconnect:
            answer.left = True
            return
        except Refusal as refusal:
            yield _event(error(str(refusal), refusal.status))
            return
    for chunk in answer.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def make_app(api: Api, key: str | None = None) -> ASGIApp:
    """The application; with a key, all but /health asks for it."""
    routes = [
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]

    async def bad(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, BadRequest)
        return Refusal(raised.status, str(raised), raised.param).response()

    async def refused(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, Refusal)
        return raised.response()

    async def left(request: Request, raised: Exception) -> Response:
        return Response(status_code=_GONE)

    async def plain(request: Request, raised: Any) -> Response:
        return JSONResponse(error(str(raised.detail), raised.status_code), raised.status_code)

    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        BadRequest: bad,
        Refusal: refused,
        ClientDisconnect: left,
        404: plain,
        405: plain,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    return _AccessLine(_Key(app, key) if key else app)


class _Key:
    """Lets pass who has the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["path"] == "/health" or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        refusal = Refusal(401, "the API key is missing or wrong", WWW_Authenticate="Bearer")
        await refusal.response()(scope, receive, send)


class _AccessLine:
    """Writes a line to stderr when a request is done."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, ended = time.perf_counter(), 500, False

        async def watch(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        scope.setdefault("state", {})
        try:
            await self._app(scope, receive, watch)
        except (ClientDisconnect, asyncio.CancelledError):
            status = _GONE
            raise
        finally:
            answer: CompletionResponse | None = scope["state"].get("answer")
            if status == 200 and (not ended or (answer is not None and answer.left)):
                status = _GONE
            client = (scope.get("client") or ("-",))[0]
            usage = answer.usage if answer else {"prompt_tokens": 0, "completion_tokens": 0}
            print(
                f"{client} {scope['method']} {scope['path']} {status} "
                f"prompt={usage['prompt_tokens']} new={usage['completion_tokens']} "
                f"{time.perf_counter() - start:.3f}s",
                file=sys.stderr,
                flush=True,
            )
