"""Tests of requests that a server refuses, and of requests that exceed their time limit."""

import asyncio
import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.distributed import run_ranks
from tests.serving.client import KEY, PROMPT, settled


@pytest.mark.parametrize(
    "change, status, named",
    [
        ({"prompt": "ba " * 200}, 400, "at most 63"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "below 500"),
        ({"prompt": [[1, "a"]]}, 400, "prompt"),
        ({"prompt": [500]}, 400, "below 500"),
        ({"prompt": ["ba"] * 129}, 400, "at most 128"),
        ({"n": 129}, 400, "at most 128"),
        ({"n": 0}, 400, "n must be"),
        ({"max_tokens": 49}, 400, "at most 48"),
        ({"max_tokens": 48, "prompt": [1] * 20}, 400, "length of 64"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"seed": 2**70}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": []}, 400, "stream_options"),
        ({"logit_bias": {"500": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": [5]}, 400, "logit_bias"),
        pytest.param({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", id="5000 digits"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"presence_penalty": "0"}, 400, "presence_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"min_p": 1.1}, 400, "min_p"),
        ({"min_tokens": 3}, 400, "min_tokens"),
        ({"stop_token_ids": [500]}, 400, "stop_token_ids"),
        ({"stop_token_ids": "5"}, 400, "stop_token_ids"),
        ({"top_k": 1.0}, 400, "top_k"),
        ({"top_k": -2}, 400, "top_k"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"skip_special_tokens": 0}, 400, "skip_special_tokens"),
        ({"guided_regex": "[0-9]+"}, 400, "guided_regex"),
        ({"truncate_prompt_tokens": 2}, 400, "truncate_prompt_tokens"),
        ({"best_of": 2}, 400, "best_of"),
        ({"suffix": "ba"}, 400, "suffix"),
        ({"store": True}, 400, "store"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"stream": True, "stream_options": {"every": 1}}, 400, "stream_options.every"),
        ({"messages": []}, 400, "messages"),
        ({"temprature": 0}, 400, "temprature"),
        ({"model": "other"}, 404, "tiny"),
    ],
    ids=str,
)
def test_completion_refusals_name_the_field(http, change, status, named):
    body = {"model": "tiny", "prompt": "ba", "max_tokens": 2} | change
    answer = http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status == error["code"] and named in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in change or error["param"] == "max_tokens"
    assert "\n" not in error["message"] and "pydantic" not in error["message"]


NO_EFFECT = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "service_tier": "auto",
    "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_p": 0,
    "min_tokens": 0, "logit_bias": {}, "stop": [], "stop_token_ids": [], "top_k": -1, "top_p": 1,
    "stream": False, "seed": None, "guided_json": None, "skip_special_tokens": True,
}  # fmt: skip


def test_fields_without_effect_are_accepted_and_have_none(http):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain = http.post("/v1/completions", json=body).json()
    more = {"best_of": 1, "suffix": "", "echo": False, "logprobs": None}
    answer = http.post("/v1/completions", json=body | NO_EFFECT | more)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain["choices"]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "ba", "name": None, "tool_calls": []}
    ]
    more = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    more |= {"modalities": ["text"], "logprobs": False, "top_logprobs": 0}
    chat = {"messages": messages, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json=chat | NO_EFFECT | more)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "change, named",
    [
        ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0].type"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt": "ba"}, "prompt"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
    ids=str,
)
def test_chat_refusals_name_the_field(http, change, named):
    body = {"messages": [{"role": "user", "content": "ba"}]} | change
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


def test_openai_client_raises_its_error_with_the_field(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="ba", extra_body={"guided_json": {}})
    assert refused.value.param == "guided_json"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="ba")


def test_malformed_requests_are_refused(server, http):
    surrogate = b'{"prompt": "\\ud800"}'
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000, surrogate):
        assert http.post("/v1/completions", content=body).status_code == 400
    assert http.post("/v1/completions", content=b" " * (9 * 2**20)).status_code == 413
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/v1/nothing").json()["error"]["code"] == 404
    for messages in (None, [], ["a"], [{"role": "user"}], [{"role": "witch", "content": "a"}]):
        answer = http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 400, messages
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"NONSENSE\r\n\r\n")
        assert b" 400 " in raw.recv(1000)
    settled(server)


def test_server_refuses_a_wrong_key(server):
    body = {"prompt": "ba", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = httpx.post(f"{server.url}{path}", json=body, headers=headers)
            assert answer.status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def answered(scheduler, asking):
    """Return the result of a coroutine that sends requests while the scheduler runs."""
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        return asyncio.run(asking)
    finally:
        scheduler.close()
        thread.join(30)


def answers_without_time_or_template(path):
    """Return, on a rank, statuses and messages of the application for some requests."""
    from megatron_ext.inference.loading import load_model
    from megatron_ext.serving.app import Api, make_app
    from megatron_ext.serving.openai_protocol import RequestLimits, RequestParser
    from megatron_ext.serving.replicas import ModelReplicas
    from megatron_ext.serving.scheduler import Scheduler

    trained = load_model(path)
    scheduler = Scheduler(ModelReplicas(trained, max_slots=2), max_waiting=4)
    reader = RequestParser(trained, "tiny", RequestLimits(prompt_tokens=3))
    app = make_app(Api(scheduler, reader, timeout=0.02, body_timeout=0.1))
    body = {"prompt": [300], "max_tokens": 60, "ignore_eos": True}

    async def slowly():
        yield b"{"
        await asyncio.sleep(1)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            message = {"messages": [{"role": "user", "content": "ba"}]}
            result = [
                await client.post("/v1/chat/completions", json=message),
                await client.post("/v1/completions", json={"prompt": [1] * 4}),
                await client.post("/v1/completions", content=slowly()),
                await client.post("/v1/completions", json=body),
                await client.post("/v1/completions", json=body | {"stream": True}),
            ]
            return [(answer.status_code, answer.text) for answer in result]

    return answered(scheduler, ask())


def test_missing_template_and_timeouts_return_a_message(run_dir):
    [result] = run_ranks(answers_without_time_or_template, 1, run_dir)
    chat, long, slow, late, streamed = result
    assert chat[0] == 400 and "no chat template" in chat[1]
    assert long[0] == 400 and "at most 3 fit" in long[1]
    assert slow[0] == 408 and "did not arrive within 0.1 seconds" in slow[1]
    assert late[0] == 504 and "0.02 seconds" in late[1]
    assert streamed[0] == 200 and "0.02 seconds" in streamed[1] and "[DONE]" not in streamed[1]


def answers_of_a_broken_model(path):
    """Return, on a rank, the answers of a model with a weight that is not finite."""
    from megatron_ext.inference.loading import load_model
    from megatron_ext.serving.app import Api, make_app
    from megatron_ext.serving.openai_protocol import RequestLimits, RequestParser
    from megatron_ext.serving.replicas import ModelReplicas
    from megatron_ext.serving.scheduler import Scheduler

    trained = load_model(path)
    scheduler = Scheduler(ModelReplicas(trained, max_slots=2), max_waiting=4)
    reader = RequestParser(trained, "tiny", RequestLimits())
    app = make_app(Api(scheduler, reader, timeout=100))
    [weight] = [p for name, p in trained.module.named_parameters() if "output_layer" in name]
    body = {"prompt": [300, 301], "max_tokens": 4, "temperature": 0, "ignore_eos": True}

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            value, weight[7, 0] = float(weight[7, 0]), float("nan")
            result = []
            for change in ({}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"stream": True}):
                result.append(await client.post("/v1/completions", json=body | {"n": 2} | change))
            weight[7, 0] = value
            result.append(
                await client.post("/v1/completions", json=body | {"logit_bias": {"007": 1}})
            )
            setattr(reader, "completion", lambda body: 1 / 0)  # noqa: B010
            result.append(await client.post("/v1/completions", json=body))
            return [(answer.status_code, answer.text) for answer in result]

    return answered(scheduler, ask())


def test_a_server_answers_in_json_when_it_fails_and_continues(run_dir):
    [result] = run_ranks(answers_of_a_broken_model, 1, run_dir)
    *broken, streamed, healed, fault = result
    for status, text in broken:
        problem = json.loads(text)["error"]
        assert status == problem["code"] == 500 and problem["type"] == "server_error"
        assert problem["message"].startswith("The logits of the model are not finite")
    assert streamed[0] == 200 and "[DONE]" not in streamed[1]
    event = json.loads(streamed[1].removeprefix("data: "))
    assert event["error"]["message"].startswith("The logits of the model are not finite")
    assert healed[0] == 200 and json.loads(healed[1])["usage"]["completion_tokens"] == 4
    assert fault[0] == 500 and "Its log has the cause" in json.loads(fault[1])["error"]["message"]
