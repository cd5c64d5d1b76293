"""Tests of unusual policies: empty responses, equal rewards, long prompts, other tokenizers."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from alignment.commands.policy_judges import endpoint_calls
from alignment.commands.train_policy_config import parse
from alignment.records import Message, Prompt
from tests.alignment.chat_model import BRIEF, make_model, write_rows
from tests.alignment.commands.test_train_policy import place as place
from tests.alignment.commands.test_train_policy import rows_of, train
from tests.alignment.endpoints.endpoint import Endpoint, chat
from tests.alignment.engines.engine_runs import saved
from tests.alignment.engines.test_routing_gap import make_expert_threshold
from tests.distributed import run_ranks

LATENCY = 0.05


def make_silent(folder):
    """Write a model that ends every response at once."""
    from transformers import LlamaForCausalLM

    make_model(folder, num_hidden_layers=1, max_position_embeddings=128)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0  # this logit is by far the largest
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[0, 0] = 8.0
    model.save_pretrained(folder)


def make_other_tokenizer(folder):
    """Write a judge with other and fewer tokens: only bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.alignment.chat_model import TEMPLATE

    make_model(folder, num_hidden_layers=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["abc"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_routed(folder, model):
    """Write a policy with thresholds and the tokenizer of another model."""
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    make_expert_threshold(folder, moe_layers=[1, 1], vocab_size=size, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / name).is_file():
            (folder / name).write_bytes((model / name).read_bytes())


def cases(folder, runs, url):
    """Return the exit code or message of each case, with its output and its warnings."""
    results = {}
    (folder / "slow.yaml").write_text(
        f"kind: endpoint\nmodel: judge\nurl: {url}\nexpected_score: false\nconcurrency: 1\n"
        f"tries: 2\ntemplate: {folder / 'pointwise-item.txt'}\n"
    )
    (folder / "local.yaml").write_text(
        f"kind: local\nmodel: {folder / 'judge'}\nlength: 512\n"
        f"template: {folder / 'pointwise-brief.txt'}\n"
    )
    rule, long = folder / "rule.yaml", folder / "long.jsonl"
    for name, judge, more in (
        ("silent", rule, ["--model", folder / "silent", "--no-reference"]),
        ("equal", rule, ["--model", folder / "silent", "--algorithm", "dapo", "--no-reference"]),
        ("some long", folder / "other.yaml", ["--prompts", folder / "prompts.jsonl", long]),
        ("all long", rule, ["--prompts", long]),
        ("held out long", rule, ["--held-out", long]),
        ("other tokenizer", folder / "local.yaml", []),
        ("slow", folder / "slow.yaml", []),
        ("routed", rule, ["--model", folder / "routed", "--routing-interval", "2"]),
    ):
        output, warned = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(warned):
            code = train(folder, runs / name, judge, 3 if name == "routed" else 1, *more)
        results[name] = (code, output.getvalue(), warned.getvalue())
    return results


@pytest.mark.slow
def test_policy_accepts_unusual_prompts(place, tmp_path):
    (place / "pointwise-brief.txt").write_text(BRIEF)
    (place / "pointwise-item.txt").write_text(
        "=== user ===\n{mark} <item> {prompt} {response} {answer}\n"
    )
    make_silent(place / "silent")
    make_other_tokenizer(place / "judge")
    make_routed(place / "routed", place / "model")
    messages = (Message("user", "good " * 100),)
    write_rows(place / "long.jsonl", [Prompt(f"long-{n}", messages) for n in range(5)])
    with Endpoint() as server:
        server.seconds, server.answer = LATENCY, lambda text: chat(str(len(text) % 10))
        [result] = run_ranks(cases, 1, place, tmp_path, server.url)
        answered = sum(server.answered.values())

    for name in ("silent", "equal"):
        assert result[name][0] == 0, result[name]
        [row] = [row for row in rows_of(tmp_path / name) if "reward" in row]
        assert row["length"] == 1 and row["groups_that_differ"] == 0 == row["grad_norm"]
        graded = [row["grade/length"] for row in rows_of(tmp_path / name) if "grade/gold" in row]
        assert graded == [1, 1]
        before, after = saved(place / "silent"), saved(tmp_path / name / "final")
        assert before and all(torch.equal(before[tensor], after[tensor]) for tensor in before)
        assert "NaN" not in (tmp_path / name / "metrics.jsonl").read_text()

    assert "24 prompts, 5 too long; 6 held out" in result["some long"][1]
    assert result["all long"][0].startswith(
        "No prompt leaves room for --max-new-tokens 12 in --seq-length 96"
    )
    assert result["held out long"][0].startswith("No prompt of --held-out leaves room")

    assert result["other tokenizer"][0] == 0, result["other tokenizer"]
    [row] = [row for row in rows_of(tmp_path / "other tokenizer") if "reward" in row]
    assert row["unrewarded"] == 0 and 0 < row["reward"] < 9 and row["reward_std"] > 0

    assert "--gold names a judge that --judge names too" in result["some long"][2]
    assert "--gold" not in result["other tokenizer"][2]

    assert result["slow"][0] == 0, result["slow"]
    [row] = [row for row in rows_of(tmp_path / "slow") if "reward" in row]
    assert row["failed"] == 0 and answered > 1
    # One call at a time, for the step's responses and for two gradings.
    seconds = row["time/judging"]
    assert seconds >= LATENCY and row["share/judging"] == pytest.approx(
        seconds * row["tokens_per_s"] / row["tokens"]
    )

    assert result["routed"][0] == 0, result["routed"]
    measured = [row for row in rows_of(tmp_path / "routed") if "reward" in row]
    assert ["routing/flip_rate" in row for row in measured] == [True, False, True]
    for row in (measured[0], measured[2]):
        assert row["routing/flip_rate"] == 0 and row["routing/decisions"] > 0
        assert row["time/routing"] > 0
    assert not any(n.startswith("routing/") for r in rows_of(tmp_path / "some long") for n in r)


@pytest.mark.parametrize("reward, calls", [("pointwise", 16), ("pairwise", 96)])
def test_dry_run_states_the_calls_of_judges_at_endpoints(
    reward: str, calls: int, tmp_path: Path
) -> None:
    endpoint = "{kind: endpoint, url: 'http://127.0.0.1:9/v1', model: big}"
    proxy, gold = tmp_path / "reward.yaml", tmp_path / "gold.yaml"
    proxy.write_text(
        f"kind: sum\ncomponents:\n  exact: {{kind: numeric-answer}}\n  style: {endpoint}\n"
    )
    gold.write_text(endpoint)
    flags = [
        *("--model", str(tmp_path), "--run-dir", "none", "--dry-run", "8", "--reward", reward),
        *("--judge", str(proxy), "--gold", str(gold), "--batch-size", "16", "--group-size", "4"),
        *("--steps", "1"),
    ]
    where = "asks big at http://127.0.0.1:9/v1, which takes no memory of the ranks: at most"
    assert endpoint_calls(parse(flags)) == [
        f"--judge reward {where} {calls} calls a step, and further ones at each evaluation.",
        f"--gold gold {where} one call for each --held-out prompt at each evaluation.",
    ]
