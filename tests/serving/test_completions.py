"""Tests of completions and chats of a served model with OpenAI's client."""

import math
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.inference.checkpoint import MAX_LENGTH
from tests.serving.client import PROMPT, settled


def test_server_lists_the_model_and_is_healthy(server, client):
    [model] = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == MAX_LENGTH
    assert settled(server) == {"status": "ok", "running": 0, "waiting": 0}


def generated(path, seeds):
    """Return, on a rank without a server, the continuations of the seeds."""
    from megatron_ext.inference.generation import generate
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.sampling import Sampling

    trained = load_model(path)
    prompt = trained.tokenizer.tokenize(PROMPT)
    sampling = Sampling(max_new_tokens=10, temperature=1.3, top_p=0.9)
    completions = generate(trained, [prompt] * len(seeds), sampling, seeds)
    return len(prompt), [vars(completion) for completion in completions]


def test_completions_are_those_of_generation_in_another_process(client, run_dir):
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


def test_streamed_chunks_join_to_the_whole_answer(client):
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


def test_stop_string_ends_the_answer_and_is_not_sent(client):
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


def test_logit_bias_and_stop_token_ids_decide_the_sample(client):
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
def test_tokens_and_offsets_join_to_the_text_with_a_stop_string(client, echo):
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
