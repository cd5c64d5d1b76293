"""A trained model served by a process of its own, asked by OpenAI's client and by clients that
misbehave."""

import asyncio
import json
import math
import signal
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from alignment.commands import annotate
from alignment.judges.formats.answers import read_answer
from alignment.records import Message, Prompt
from tests.distributed import run_ranks
from tests.inference.checkpoint import MAX_LENGTH, run_dir  # noqa: F401
from tests.serving.client import KEY, Server, write_template

PROMPT = "ba ké lo mü"


@pytest.fixture(scope="module")
def server(run_dir, tmp_path_factory):  # noqa: F811
    flags = ["--load", run_dir, "--max-batch-size", 8, "--max-waiting", 250, "--max-tokens", 48]
    flags += ["--max-choices", 128]
    template = write_template(tmp_path_factory.mktemp("template"))
    server = Server(*flags, "--chat-template", template, "--model-name", "tiny")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with server.http() as client:
        yield client


def settled(server):
    """The server's counts once nothing runs."""
    for _ in range(200):
        health = server.health()
        if health["running"] == health["waiting"] == 0:
            return health
        time.sleep(0.05)
    raise AssertionError(health)


def test_server_lists_the_model_and_is_healthy(server, client):
    [model] = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == MAX_LENGTH
    assert settled(server) == {"status": "ok", "running": 0, "waiting": 0}


def generated(path, seeds):
    """On a rank, without a server: what the seeds give."""
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.sampling import Sampling

    trained = load_model(path)
    prompt = trained.tokenizer.tokenize(PROMPT)
    sampling = Sampling(max_new_tokens=10, temperature=1.3, top_p=0.9)
    completions = generate(trained, [prompt] * len(seeds), sampling, seeds)
    return len(prompt), [vars(completion) for completion in completions]


def test_completions_are_those_of_generation_in_another_process(client, run_dir):  # noqa: F811
    [(length, rows)] = run_ranks(generated, 1, run_dir, [5, 6, 7])
    options = {"seed": 5, "temperature": 1.3, "top_p": 0.9, "max_tokens": 10}
    answer = client.completions.create(model="tiny", prompt=PROMPT, n=3, logprobs=2, **options)
    assert [choice.text for choice in answer.choices] == [row["text"] for row in rows]
    for choice, row in zip(answer.choices, rows):
        assert choice.logprobs.token_logprobs == pytest.approx(row["log_probs"], abs=1e-4)
        assert choice.finish_reason == {"length": "length", "eod": "stop"}[row["finish"]]
    new = sum(len(row["tokens"]) for row in rows)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, new)
    assert len({row["text"] for row in rows}) > 1


def test_log_probs_name_the_likeliest_and_greedy_takes_it(client):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=3
    )
    result = answer.choices[0].logprobs
    assert len(result.tokens) == answer.usage.completion_tokens
    assert "".join(result.tokens) == answer.choices[0].text
    for token, value, top in zip(result.tokens, result.token_logprobs, result.top_logprobs):
        assert top[token] == value == max(top.values())
        assert sum(math.exp(v) for v in top.values()) <= 1 + 1e-6


def test_echo_scores_the_prompt_as_generation_scored_it(client):
    """Greedily sampled tokens have the same log-probabilities when they are part of a prompt."""
    first = client.completions.create(
        model="tiny", prompt=[10, 11, 12], temperature=0, max_tokens=5, logprobs=1
    )
    text, scores = first.choices[0].text, first.choices[0].logprobs.token_logprobs
    prompt = [10, 11, 12]
    for number in range(1, 6):  # its ids, one longer prompt at a time
        longer = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=1, logprobs=1, echo=True
        )
        result = longer.choices[0].logprobs
        assert result.token_logprobs[0] is None and len(result.tokens) == len(prompt) + 1
        assert result.token_logprobs[-1] == pytest.approx(scores[number - 1], abs=1e-5)
        if number > 1:
            actual = result.token_logprobs[3:]
            assert actual == pytest.approx(scores[:number], abs=1e-5)
        prompt = [*prompt, prompt[-1] + 1]  # the model counts, as its training data did
        if not text:
            break
    scored = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, logprobs=1, echo=True
    )
    assert scored.usage.completion_tokens == 0
    assert len(scored.choices[0].logprobs.tokens) == len(prompt)


def test_streams_add_up_to_the_whole_answer(client):
    options = {"model": "tiny", "prompt": [PROMPT, "su té"], "seed": 3, "max_tokens": 12, "n": 2}
    whole = client.completions.create(**options)
    texts: dict[int, str] = {}
    reasons, usage = {}, None
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert [texts[i] for i in range(4)] == [choice.text for choice in whole.choices]
    assert [reasons[i] for i in range(4)] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_stop_string_is_neither_sent_nor_passed(client):
    options = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    free = client.completions.create(**options).choices[0].text
    stop = free[len(free) // 2 :][:3]
    cut = client.completions.create(**options, stop=["§", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (free[: free.index(stop)], "stop")
    chunks = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text


def test_chat_is_a_completion_of_the_rendered_template(client):
    messages = [{"role": "system", "content": "ba ké"}, {"role": "user", "content": "lo"}]
    options = {"model": "tiny", "seed": 8, "temperature": 0.7}
    plain = client.completions.create(prompt="ba ké lo ", max_tokens=9, **options)
    chat = client.chat.completions.create(
        messages=messages, max_completion_tokens=9, logprobs=True, top_logprobs=2, **options
    )
    choice = chat.choices[0]
    assert choice.message.content == plain.choices[0].text and choice.message.role == "assistant"
    assert len(choice.logprobs.content) == chat.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    parts = [{"type": "text", "text": "ba ké lo"}]
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], max_tokens=9, stream=True, **options
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content


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


def test_the_client_raises_its_own_error_with_the_field(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="ba", extra_body={"guided_json": {}})
    assert refused.value.param == "guided_json"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="ba")


def test_bias_and_further_end_tokens_decide_what_is_sampled(client):
    options = {"model": "tiny", "prompt": [10, 11, 12], "temperature": 0, "max_tokens": 6}
    forced = client.completions.create(**options, logit_bias={"77": 100}).choices[0]
    extra = {"stop_token_ids": [77]}
    ended = client.completions.create(**options, logit_bias={"77": 100}, extra_body=extra)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1 and forced.finish_reason == "length"
    longer = extra | {"min_tokens": 4}
    later = client.completions.create(**options, logit_bias={"77": 100}, extra_body=longer)
    assert later.usage.completion_tokens == 5 and later.choices[0].finish_reason == "stop"
    barred = client.completions.create(
        **options, logit_bias={"77": 100}, frequency_penalty=2, extra_body={"min_p": 0.5}
    )
    assert barred.choices[0].text == forced.text  # a bias of 100 outweighs all penalties of these


# The hotter, the more byte pieces, which make broken characters.
HOT = {"model": "tiny", "prompt": [260, 261], "temperature": 20.0, "max_tokens": 40, "n": 8}


@pytest.mark.parametrize("echo", [False, True])
def test_tokens_and_offsets_join_to_the_text_also_after_a_stop(client, echo):
    free = client.completions.create(**HOT, seed=1, logprobs=3, echo=echo)
    text = free.choices[0].text
    stop = [text[len(text) // 2 :][:2], "b", "é"]
    cut = client.completions.create(**HOT, seed=1, logprobs=3, echo=echo, stop=stop)
    assert any("\ufffd" in choice.text for choice in free.choices)
    assert any(choice.finish_reason == "stop" for choice in cut.choices)
    for choice in [*free.choices, *cut.choices]:
        result = choice.logprobs
        assert "".join(result.tokens) == choice.text
        for token, offset in zip(result.tokens, result.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token
        for token, value, top in list(
            zip(result.tokens, result.token_logprobs, result.top_logprobs, strict=True)
        )[echo:]:
            assert top[token] == value
    if not echo:
        counts = sum(len(choice.logprobs.tokens) for choice in cut.choices)
        assert counts == cut.usage.completion_tokens
    for whole, choice in zip(free.choices, cut.choices):
        assert whole.text.startswith(choice.text)


def test_streamed_tokens_and_bytes_join_to_the_whole_answer(client):
    messages = [{"role": "user", "content": "ba ké"}]
    options = {key: HOT[key] for key in ("model", "temperature", "max_tokens", "n")}
    options |= {"messages": messages, "seed": 4, "logprobs": True, "top_logprobs": 2}
    options |= {"stop": ["b", "lo"]}
    whole = client.chat.completions.create(**options)
    texts: dict[int, str] = {}
    tokens: dict[int, list[Any]] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        [choice] = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.logprobs:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content)
            assert "".join(t.token for t in choice.logprobs.content) == choice.delta.content
    for choice in whole.choices:
        content = choice.logprobs.content
        assert texts[choice.index] == choice.message.content
        assert tokens[choice.index] == content
        assert bytes(b for t in content for b in t.bytes) == choice.message.content.encode()


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


def test_a_wrong_key_is_refused(server):
    body = {"prompt": "ba", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = httpx.post(f"{server.url}{path}", json=body, headers=headers)
            assert answer.status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_two_hundred_concurrent_requests_get_independent_results(server):
    """A tenth leave before they are answered; no tokens change, and nothing stays behind.

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
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, limits=limits, timeout=120
        ) as client:
            calls = [ask(client, body, i % 10 == 9) for i, body in enumerate(bodies)]
            together = await asyncio.gather(*calls)
            settled(server)
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
    """Eight rows and 250 places: two requests of 128 continuations fit, a third does not."""
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


def test_annotation_has_its_responses_and_log_probabilities_of_it(
    server, client, tmp_path, monkeypatch
):
    """`et-align annotate` against this project's own server."""
    monkeypatch.setenv("MEGATRON_ET_JUDGE_API_KEY", KEY)
    prompt = Prompt("p", [Message("user", PROMPT)], "here")
    prompts, made = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text(json.dumps(prompt.to_row()) + "\n")
    judge = ["--judge", f"{server.url}/v1", "--model", "tiny", "--max-tokens", "10"]
    judge += ["--temperature", "1.3", "--seed", "5"]
    files = ["--input", str(prompts), "--output", str(made)]
    assert annotate.main([*files, *judge, "--generate", "--samples", "2"]) == 0
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    messages = [{"role": "user", "content": PROMPT}]
    for seed, row in enumerate(rows, start=5):
        options = {"seed": seed, "temperature": 1.3, "max_tokens": 10}
        answer = client.chat.completions.create(model="tiny", messages=messages, **options)
        assert row["text"] == answer.choices[0].message.content
    assert len(rows) == 2 and rows[0]["prompt"] == json.loads(prompts.read_text())
    used = json.loads((tmp_path / "responses.jsonl.about.json").read_text())["used"]
    assert used["answers"] == 2 and used["prompt_tokens"] == 2 * answer.usage.prompt_tokens
    # Its log-probabilities are read, though no token of these is a digit.
    with server.http() as http:
        body = {"messages": messages, "logprobs": True, "top_logprobs": 20, "max_tokens": 3}
        content = http.post("/v1/chat/completions", json=body).content
    assert read_answer(content, log_probs=True).labels == []
    # The template of a judge does not fit into this model: a failure with the server's reason.
    verdicts = tmp_path / "verdicts.jsonl"
    files = ["--input", str(made), "--output", str(verdicts), "--max-failed", "1"]
    assert annotate.main([*files, *judge]) == 0
    for line in verdicts.read_text().splitlines():
        verdict = json.loads(line)
        assert verdict["outcome"] == "failed" and "status 400: A prompt has" in verdict["reason"]


def test_sigterm_finishes_what_runs_and_refuses_the_rest(server):  # the last: it ends the server
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


def answers_without_time_or_template(path):
    """On a rank, the application alone: statuses and messages of some requests."""
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

    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        return asyncio.run(ask())
    finally:
        scheduler.close()
        thread.join(30)


def test_missing_template_and_timeouts_return_a_message(run_dir):  # noqa: F811
    [result] = run_ranks(answers_without_time_or_template, 1, run_dir)
    chat, long, slow, late, streamed = result
    assert chat[0] == 400 and "no chat template" in chat[1]
    assert long[0] == 400 and "at most 3 fit" in long[1]
    assert slow[0] == 408 and "did not arrive within 0.1 seconds" in slow[1]
    assert late[0] == 504 and "0.02 seconds" in late[1]
    assert streamed[0] == 200 and "0.02 seconds" in streamed[1] and "[DONE]" not in streamed[1]
