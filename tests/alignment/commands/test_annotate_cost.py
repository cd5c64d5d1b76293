"""Tests of the cost of an annotation before, during and after the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.commands.annotate import main
from alignment.endpoints.cost_estimate import CostEstimate, Speed
from alignment.endpoints.usage import Prices, TokenUsage
from megatron_ext.errors import UserError
from tests.alignment.chat_model import make_tokenizer
from tests.alignment.commands.test_annotate import Done, annotate, responses, rows, texts_of
from tests.alignment.endpoints import endpoint
from tests.alignment.endpoints.endpoint import Endpoint

# The server reports 100 prompt tokens and 10 answer tokens per answer.
PRICES = ("--price-in", 2, "--price-out", 10)
DOLLARS = (100 * 2 + 10 * 10) / 1e6


def total(server: Endpoint) -> int:
    return sum(server.answered.values())


def test_dry_run_states_calls_tokens_hours_and_dollars_and_writes_nothing(tmp_path: Path) -> None:
    texts = texts_of(12)
    with Endpoint() as server:
        file = responses(tmp_path, texts)
        before = set(tmp_path.iterdir())
        flags = ("--tokens-per-second", 2, "--replicas", 2, "--answer-tokens", 10,
                 "--max-tokens", 50)  # fmt: skip
        done = annotate(file, server, *PRICES, *flags, "--dry-run")
        assert done.returncode == 0 and set(tmp_path.iterdir()) == before and not server.calls
        assert "12 questions, 0 answered before" in done.stdout
        assert "calls          12\n" in done.stdout
        assert "120 expected, 10 an answer as stated (--answer-tokens); at most 600" in done.stdout
        assert "estimated at 4 characters a token" in done.stdout
        assert "about 30 s (4 answer tokens/s: 2 replica(s) of 2 tokens/s" in done.stdout

        without = annotate(file, server, "--dry-run")
        assert "cost           unknown: add --price-in and --price-out" in without.stdout
        assert "time           unknown until answers arrive" in without.stdout

        assert annotate(file, server, *PRICES).returncode == 0
        file = responses(tmp_path, texts_of(20))
        again = annotate(file, server, *PRICES, "--dry-run")
        assert "20 questions, 12 answered before" in again.stdout
        assert "80 expected, 10 an answer by the 12 answers in the cache" in again.stdout
        assert "spent before" in again.stdout


def test_run_ends_before_its_budget_is_exceeded_and_resumes(tmp_path: Path) -> None:
    texts = texts_of(40)
    with Endpoint() as server:
        server.seconds = 0.01
        file = responses(tmp_path, texts)
        flags = (*PRICES, "--max-tokens", 20, "--concurrency", 8)
        limit = 20.5 * DOLLARS
        done = annotate(file, server, *flags, "--max-cost", limit)
        assert done.returncode == 4
        assert "one more call may cost up to $" in done.stderr
        assert "Repeat the command with a higher limit to resume" in done.stderr
        spent = total(server)
        assert 0 < spent * DOLLARS <= limit
        assert not (tmp_path / "verdicts.jsonl").exists()

        # Earlier costs count, so that the same limit allows no further call.
        same = annotate(file, server, *flags, "--max-cost", limit)
        assert same.returncode == 4 and total(server) == spent
        least = annotate(file, server, *flags, "--max-cost", spent * DOLLARS)
        assert least.returncode == 4 and "so that nothing is left" in least.stderr
        assert total(server) == spent
        plan = annotate(file, server, *flags, "--max-cost", spent * DOLLARS, "--dry-run")
        assert plan.returncode == 4 and "enough for about 0 of" in plan.stdout

        whole = annotate(file, server, *flags, "--max-cost", 1)
        assert whole.returncode == 0, whole.stderr
        assert server.answered.total() == len(texts) == len(rows(tmp_path / "verdicts.jsonl"))


def test_tries_that_may_be_billed_count_against_the_budget(tmp_path: Path) -> None:
    with Endpoint(lambda text, number: endpoint.half) as server:
        file = responses(tmp_path, texts_of(30))
        flags = (*PRICES, "--max-tokens", 100, "--concurrency", 4, "--max-failed", 1)
        done = annotate(file, server, *flags, "--max-cost", 0.02)
        assert done.returncode == 4 and "one more call may cost" in done.stderr
        # An answer that was cut off in transmission may have had 100 tokens.
        assert server.calls.total() * 100 * 10 / 1e6 <= 0.02


def test_judge_file_holds_prices_budget_and_limits(tmp_path: Path) -> None:
    with Endpoint() as server:
        file = responses(tmp_path, texts_of(10))
        judge = tmp_path / "judge.yaml"
        text = (
            f"kind: endpoint\nurl: {server.url}\nmodel: judge\nexpected_score: false\n"
            "price_in: 2\nprice_out: 10\nmax_cost: 0.006\nmax_new_tokens: 20\nfirst_wait: 0.01\n"
        )
        judge.write_text(text)
        output = ["--input", str(file), "--output", str(tmp_path / "verdicts.jsonl")]
        with pytest.raises(UserError, match=r"--max-cost 0\.006: the answers so far"):
            main([*output, "--judge", str(judge)])
        assert 0 < total(server) * DOLLARS <= 0.006
        assert main([*output, "--judge", str(judge), "--max-cost", "1"]) == 0  # the flag decides
        assert total(server) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--price-in", -1, "--price-out", 1), "--price-in -1.0 must be at least 0"),
        ((*PRICES, "--max-cost", 0), "--max-cost 0.0 must be above 0"),
        (("--price-in", 1), "--price-in .* requires --price-out"),
        (("--max-cost", 1), "--max-cost .* requires --price-in and --price-out"),
        (("--price-cached", 1), "--price-cached .* requires --price-in and --price-out"),
        (("--answer-tokens", 30, "--max-tokens", 20), "--answer-tokens 30 .* exceeds"),
        (("--concurrency", 4, "--replicas", 8), "--concurrency 4 .* is too low for --replicas 8"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere does not exist"),
    ],
)
def test_contradictory_settings_are_refused(
    tmp_path: Path, flags: tuple[Any, ...], message: str
) -> None:
    with Endpoint() as server:
        file = responses(tmp_path, texts_of(2))
        done: Done = annotate(file, server, *flags, "--dry-run")
        assert done.returncode == 2
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(done.stderr)
        assert not server.calls


def test_prompt_tokens_are_counted_by_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    make_tokenizer(folder)
    with Endpoint() as server:
        file = responses(tmp_path, texts_of(3))
        done = annotate(file, server, "--tokenizer", str(folder), "--dry-run")
        assert not server.calls
        assert f"counted by the tokenizer in {folder}" in done.stdout
        annotate(file, server)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chats = [
            tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=False
            )
            for body in server.bodies
        ]
        count = sum(len(ids) for ids in tokenizer(chats, add_special_tokens=False)["input_ids"])
        assert f"prompt tokens  {count:,}, counted" in done.stdout


def test_first_answers_revise_the_estimate() -> None:
    estimate = CostEstimate(
        1000, 50_000, 100, 500, Prices(1.0, 10.0), Speed(), "counted", "assumed"
    )
    usage = TokenUsage(50, 50 * 60, 50 * 200)
    assert estimate.revised(usage, 100.0) == (
        "after 50 answers: 60 tokens in and 200 out an answer, 200,000 answer tokens in all, "
        "$2.06 in all, 33 min in all"
    )
    assert estimate.revised(TokenUsage(50, 0, 0, 50), 100.0) == "after 50 answers: 33 min in all"


def test_time_is_that_of_the_slowest_bound() -> None:
    speed = Speed(64, 2, 100.0)  # half of the calls that two replicas can use
    assert list(speed.seconds(10, 0, 1000).values()) == [10.0]
    limited = Speed(128, 2, 100.0, requests_per_minute=6, tokens_per_minute=60_000)
    assert list(limited.seconds(10, 9_000, 1000).values()) == [5.0, 100.0, 10.0]


def test_about_file_states_cached_tokens_and_dollars(tmp_path: Path) -> None:
    def answer(text: str) -> dict[str, Any]:
        body = endpoint.chat(text[0])
        body["usage"]["prompt_tokens_details"] = {"cached_tokens": 60}
        return body

    with Endpoint() as server:
        server.answer = answer
        file = responses(tmp_path, texts_of(4))
        done = annotate(file, server, *PRICES, "--price-cached", 0.5)
        assert done.returncode == 0, done.stderr
        about = json.loads((tmp_path / "verdicts.jsonl.about.json").read_text())["used"]
        assert about["cached_tokens"] == 240
        assert about["dollars"] == pytest.approx(4 * (40 * 2 + 60 * 0.5 + 10 * 10) / 1e6)
        assert "400 tokens in (240 of them cached), 40 out" in done.stdout
