"""A real HTTP server that counts calls and fails on request."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler"], None]


class Endpoint:
    """Endpoint that answers a digit, by default the first character of the item's text.

    Attributes:
        faults: Function from an item's text and the number of the call about it, from 0, to the
            action that replaces the answer.
        seconds: Duration of an answer.
        calls: Number of calls about each item.
        answered: Number of complete answers about each item.
        bodies: Bodies of all calls.
        most_at_once: Largest number of calls in progress at the same time.
    """

    def __init__(self, faults: Callable[[str, int], Fault | None] = lambda text, n: None) -> None:
        self.faults, self.seconds = faults, 0.0
        self.answer: Callable[[str], dict[str, Any]] = lambda text: chat(text[0])
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.endpoint = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def enter(self, text: str, body: dict[str, Any]) -> int:
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.bodies.append(body)
            self.calls[text] += 1
            return self.calls[text] - 1

    def leave(self) -> None:
        with self.lock:
            self._at_once -= 1


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # by default the system resets connections of the sixth caller on

    def handle_error(self, *_: object) -> None:
        """Ignore errors, because tests kill clients."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        endpoint: Endpoint = self.server.endpoint  # type: ignore[attr-defined]
        content = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(content) < length:
            return  # a client that was killed
        body = json.loads(content)
        text = item_of(body)
        number = endpoint.enter(text, body)
        endpoint.keys.add(self.headers["Authorization"])
        try:
            assert self.path == "/v1/chat/completions"
            if fault := endpoint.faults(text, number):
                fault(self)
                return
            time.sleep(endpoint.seconds)
            answer = json.dumps(endpoint.answer(text)).encode()
            # Counted before it leaves: a client that has an answer has a counted one.
            with endpoint.lock:
                endpoint.answered[text] += 1
            self.reply(200, answer)
        except OSError:
            self.close_connection = True  # the client is gone
        finally:
            endpoint.leave()

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def item_of(body: dict[str, Any]) -> str:
    """Return the text of the item, which tests write between angle brackets."""
    result = re.search(r"(?:^|\s)<([^<>\n]+)>", body["messages"][-1]["content"])
    assert result is not None
    return result[1]


def chat(text: str, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "finish_reason": "stop", "message": message, **more}
    return {"choices": [choice], "usage": usage}


def status(number: int, **headers: str) -> Fault:
    error = json.dumps({"error": {"message": f"this is {number}"}}).encode()
    return lambda handler: handler.reply(number, error, **headers)


def body(content: bytes, **headers: str) -> Fault:
    return lambda handler: handler.reply(200, content, **headers)


def hang(handler: Handler) -> None:
    handler.server.endpoint.closing.wait(60)  # type: ignore[attr-defined]


def drip(handler: Handler) -> None:
    """Send a byte now and then, so that no read times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.endpoint.closing.wait(0.1):  # type: ignore[attr-defined]
        handler.wfile.write(b" ")


def reset(handler: Handler) -> None:
    """Break the connection in the middle of the head."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def half(handler: Handler) -> None:
    """Break the connection in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
