"""Tests of `et-align annotate` against this project's server."""

import json

from alignment.commands import annotate
from alignment.judges.formats.answers import read_answer
from alignment.records import Message, Prompt
from tests.serving.client import KEY, PROMPT


def test_annotate_receives_responses_and_log_probs_from_the_server(
    server, client, tmp_path, monkeypatch
):
    """The server is a separate process."""
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
