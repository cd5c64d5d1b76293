"""Tests of a server with many clients, some of which leave, and of its end."""

import asyncio
import signal
import time

import httpx
import pytest

from tests.serving.client import KEY, settled


def test_server_answers_two_hundred_concurrent_requests_independently(server):
    """A tenth of the clients leave before the answer; no tokens change, and nothing remains.

    180 + 20 x 3 continuations fit into eight rows and 250 places, however fast they come.
    """
    bodies = [
        {
            "prompt": [10 + i % 7] * (1 + i % 5),
            "max_tokens": 2 + i % 9,
            "seed": i,
            "temperature": [0, 1, 1.5][i % 3],
            "logprobs": 0,
        }
        for i in range(200)
    ]

    async def ask(client, body, leave):
        if leave:
            longer = {"max_tokens": 48, "n": 3, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body | longer) as answer:
                await anext(answer.aiter_lines())
            return None
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        [choice] = answer.json()["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    async def all_at_once():
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=None)
        options = {"base_url": server.url, "headers": headers, "limits": limits, "timeout": 120}
        async with httpx.AsyncClient(**options) as client:
            calls = [ask(client, body, i % 10 == 9) for i, body in enumerate(bodies)]
            together = await asyncio.gather(*calls)
        settled(server)
        # New connections, as the server has closed the idle ones after five seconds.
        async with httpx.AsyncClient(**options) as client:
            some = range(0, 200, 13)
            return together, {i: await ask(client, bodies[i], False) for i in some}

    threads = server.threads()
    together, alone = asyncio.run(all_at_once())
    assert sum(answer is not None for answer in together) == 180
    for i, (text, scores) in alone.items():
        if together[i] is not None:
            assert together[i][0] == text
            assert together[i][1] == pytest.approx(scores, abs=1e-4)
    # Those that read bodies in threads stay, at most as many as asyncio keeps.
    assert server.threads() <= threads + 32
    assert any(" 499 " in line for line in server.stderr)
    lines = [line for line in server.stderr if "/v1/completions 200" in line]
    assert len(lines) >= 180 and "prompt=" in lines[-1]


LONG = {"prompt": [300], "max_tokens": 48, "n": 64, "ignore_eos": True, "stream": True}


def test_client_disconnect_frees_its_slots(server, http):
    with http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()  # the connection closes with the last reference to this
        next(lines)
        # Eight rows end in the same pass, and then none runs until the next eight join.
        deadline = time.monotonic() + 20
        while not (health := http.get("/health").json())["running"]:
            assert time.monotonic() < deadline, health
        assert health["running"] == 8 and health["waiting"] > 0
    settled(server)
    left = [line for line in server.stderr if " 499 " in line][-1]
    assert 1 <= int(left.split("new=")[1].split()[0]) < 64 * 48


def test_full_queue_returns_retry_after(server, http):
    """Two requests of 128 continuations fit in eight rows and 250 places, a third does not."""
    long_request = LONG | {"n": 128}
    with (
        server.http() as one,
        server.http() as two,
        one.stream("POST", "/v1/completions", json=long_request) as first,
        two.stream("POST", "/v1/completions", json=long_request) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        full = http.post("/v1/completions", json=long_request | {"stream": False})
    assert full.status_code == 429 and full.headers["Retry-After"] == "1"
    settled(server)
    again = {"prompt": [300], "max_tokens": 12, "n": 32, "ignore_eos": True}
    assert http.post("/v1/completions", json=again).status_code == 200


@pytest.fixture
def second_server(start_server):
    """Return a server that a test may end."""
    server = start_server()
    yield server
    server.stop()


def test_sigterm_finishes_running_requests_and_refuses_new_ones(second_server):
    server = second_server
    with server.http() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        while client.get("/health").json()["status"] != "closing":
            time.sleep(0.01)  # a request may overtake the signal
        late = client.post("/v1/completions", json={"prompt": "ba", "max_tokens": 2})
        assert late.status_code == 503 and "Retry-After" in late.headers
        rest = [line for line in lines if line]
    finished = sum('"finish_reason": "length"' in line for line in rest)
    assert finished == 64 and rest[-1] == "data: [DONE]"
    assert server.process.wait(30) == 0
    assert not any("Traceback" in line for line in server.stderr)
