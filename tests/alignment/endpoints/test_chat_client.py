"""Tests of limits on answers from the context length that an endpoint states."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from alignment.endpoints.chat_client import ChatClient, ChatRequest, ChatSampling
from alignment.endpoints.client import CallFailed
from alignment.records import Message
from tests.alignment.endpoints.endpoint import chat

CONTEXT = 100


class Endpoint:
    """Endpoint that refuses answers beyond its context, as vLLM and this project's server do.

    A prompt has as many tokens as characters. An answer without a limit gets what is left.
    """

    def __init__(self, tokenizes: bool, states_context: bool = True) -> None:
        self.tokenizes, self.states_context = tokenizes, states_context
        self.limits: list[int | None] = []
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            model = {"id": "m"} | ({"max_model_len": CONTEXT} if self.states_context else {})
            return httpx.Response(200, json={"data": [model]})
        body = json.loads(request.content)
        count = sum(len(message["content"]) for message in body["messages"])
        if request.url.path == "/tokenize":
            if not self.tokenizes:
                return httpx.Response(404, json={"detail": "Not Found"})
            return httpx.Response(200, json={"count": count, "max_model_len": CONTEXT})
        limit = body.get("max_tokens", CONTEXT - count)
        self.limits.append(body.get("max_tokens"))
        if count >= CONTEXT or count + limit > CONTEXT:
            error = {"message": "maximum context length is 100 tokens", "code": 400}
            return httpx.Response(400, json={"error": error})
        return httpx.Response(200, json=chat("7"))


def ask(endpoint: Endpoint, *lengths: int, limit: int) -> tuple[list[Any], list[str]]:
    """Return the answers, or errors, to prompts of some lengths, and the reported messages."""
    lines: list[str] = []

    async def run() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(endpoint)) as http:
            client = ChatClient("http://a/v1", http, report=lines.append)
            results: list[Any] = []
            for length in lengths:
                messages = [Message("user", "x" * length)]
                request = ChatRequest("m", messages, ChatSampling(max_tokens=limit))
                try:
                    results.append((await client.ask(request)).text)
                except CallFailed as error:
                    results.append(str(error))
            return results

    return asyncio.run(run()), lines


@pytest.mark.parametrize("tokenizes", [True, False])
def test_answers_are_limited_to_what_prompts_leave(tokenizes: bool) -> None:
    endpoint = Endpoint(tokenizes)
    answers, lines = ask(endpoint, 30, 60, limit=8192)
    assert answers == ["7", "7"]
    # The limit was refused once; after that the context is known.
    assert endpoint.limits == ([8192, 70, 40] if tokenizes else [8192, None, None])
    assert endpoint.paths.count("/v1/models") == 1
    assert len(lines) == 1 and "http://a/v1 serves 100 tokens" in lines[0]


def test_limits_that_fit_are_left_alone() -> None:
    endpoint = Endpoint(tokenizes=True)
    answers, lines = ask(endpoint, 30, 80, 40, limit=50)
    assert answers == ["7", "7", "7"] and len(lines) == 1
    assert endpoint.limits == [50, 50, 20, 50]


def test_a_prompt_that_fills_the_context_fails() -> None:
    endpoint = Endpoint(tokenizes=True)
    [answer], _ = ask(endpoint, 120, limit=50)
    assert answer == "the prompt has 120 tokens, and the context of m has 100"


def test_a_refusal_of_an_endpoint_without_a_context_stays() -> None:
    endpoint = Endpoint(tokenizes=False, states_context=False)
    answers, lines = ask(endpoint, 120, 120, limit=50)
    assert all("maximum context length" in answer for answer in answers) and not lines
    assert endpoint.limits == [50, 50] and endpoint.paths.count("/v1/models") == 1
