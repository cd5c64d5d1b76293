"""Tests of policies trained on sums of judges, without gold, and on judges with prices."""

import contextlib
import io
import json

import numpy as np
import pytest

from alignment.commands.train_policy import main
from alignment.commands.train_policy_config import parse
from alignment.record_files import read_all
from alignment.records import Prompt
from megatron_ext.errors import UserError
from tests.alignment.commands.test_train_policy import place as place
from tests.alignment.commands.test_train_policy import rows_of
from tests.alignment.endpoints.endpoint import Endpoint, chat
from tests.distributed import run_ranks

SUM = """
kind: sum
components:
  vowel: {kind: pattern, pattern: "[ae]", weight: 1}
  text: {kind: rule, rule_text: FOLDER/text.txt, weight: 3, only_if: vowel, otherwise: 1}
"""
PRICED = """
kind: sum
components:
  nothing: {kind: pattern, pattern: "^$", weight: -1}
  grader:
    kind: endpoint
    url: URL
    model: judge
    expected_score: false
    template: FOLDER/pointwise-brief.txt
    max_new_tokens: 100
    price_in: 1000
    price_out: 2000
    max_cost: COST
"""


def train(folder, run, judge, *more):
    """Return the exit code of two steps of `train-policy` without gold, or its error message."""
    words = [
        *("--model", folder / "model", "--run-dir", run, "--steps", 2, "--judge", judge),
        *("--prompts", folder / "prompts.jsonl", "--batch-size", 16, "--group-size", 4),
        *("--mini-batches", 1, "--max-new-tokens", 12, "--temperature", 0.8, "--seq-length", 96),
        *("--lr", 1e-2, "--eval-interval", 2, "--save-interval", 2, "--micro-batch-size", 4),
        *("--no-reference", *more),
    ]
    try:
        return main([str(word) for word in words])
    except UserError as error:
        return str(error)


def run_all(place, runs, url):
    """Return the outcome of each run, with its output and its warnings."""
    results = {}
    (place / "sum.yaml").write_text(SUM.replace("FOLDER", str(place)))
    priced = PRICED.replace("FOLDER", str(place)).replace("URL", url)
    held_out = ("--held-out", place / "held_out.jsonl")
    for name, run, judge, cost, more in (
        ("alone", "alone", "sum", 0, ()),
        ("graded", "graded", "sum", 0, held_out),
        ("poor", "priced", "priced", 3, ()),
        ("rich", "priced", "priced", 1000, ()),
    ):
        (place / "priced.yaml").write_text(priced.replace("COST", str(cost)))
        output, warned = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(warned):
            result = train(place, runs / run, place / f"{judge}.yaml", *more)
        results[name] = (result, output.getvalue(), warned.getvalue())
    return results


@pytest.mark.slow
def test_rewards_are_sums_with_one_curve_each_and_gold_may_be_left_out(place, tmp_path):
    (place / "pointwise-brief.txt").write_text(
        "=== user ===\n{mark} <item> {prompt} {response} {answer}\n"
    )
    with Endpoint() as server:
        server.answer = lambda text: chat(str(len(text) % 10))
        [results] = run_ranks(run_all, 1, place, tmp_path, server.url)
        bodies = list(server.bodies)

    assert results["alone"][0] == 0, results["alone"]
    assert "--gold and --held-out are left out, so that this run cannot show" in results["alone"][2]
    rows = rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [1, 2]
    assert not any(name.startswith("grade/") for row in rows for name in row)
    assert not (tmp_path / "alone" / "first.json").exists()
    for row in rows:
        vowels = row["component/vowel"] / 9
        text = row.get("component/text", 0) * vowels + 1 * (1 - vowels)
        assert row["reward"] == pytest.approx((row["component/vowel"] + 3 * text) / 4)

    assert results["graded"][0] == 0, results["graded"]
    assert "--gold is left out, so that" in results["graded"][2]
    graded = [row for row in rows_of(tmp_path / "graded") if "grade/proxy" in row]
    assert [row["step"] for row in graded] == [0, 2]
    for row in graded:
        assert {"grade/gold", "grade/gap", "grade/alarm"}.isdisjoint(row)
        assert 0 <= row["component_held_out/vowel"] <= 9 and row["grade/prompts"] == 6
    samples = (tmp_path / "graded" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["scores"].keys() == {"proxy"}

    assert "grader: max_cost 3 does not pay for another call" in results["poor"][0]
    assert "Raise max_cost in the judge's file" in results["poor"][0]
    assert results["rich"][0] == 0, results["rich"]
    rows = {row["step"]: row for row in rows_of(tmp_path / "priced")}
    [file] = (tmp_path / "priced" / "verdicts").glob("grader.answers/*.jsonl")
    answers = [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    assert len(answers) == len(bodies) == len({json.dumps(body) for body in bodies})
    cost = sum(a["prompt_tokens"] * 1000 + a["completion_tokens"] * 2000 for a in answers) / 1e6
    assert rows[2]["usage/dollars_total"] == pytest.approx(cost)
    # What the first process paid for is in the total, and not in the steps of the second.
    assert 0 < sum(row["usage/dollars"] for row in rows.values()) < cost
    for row in rows.values():
        means = [row["component/grader"], 9 - row["component/nothing"]]
        assert row["reward"] == pytest.approx(np.mean(means))
    assert f"${cost:,.4f} in the whole run" in results["rich"][1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gold", "g.yaml"], "--gold grades the responses to --held-out prompts"),
        (["--second-gold", "g.yaml"], "--second-gold requires --gold"),
        (["--stop-on-alarm"], "--stop-on-alarm requires --gold"),
    ],
)
def test_grading_flags_require_held_out_prompts(place, flags, message):
    words = [
        "--model",
        str(place / "model"),
        "--run-dir",
        "r",
        "--steps",
        "1",
        "--prompts",
        "p",
        "--judge",
        "j",
    ]
    with pytest.raises(UserError, match=message):
        parse([*words, *flags])


def test_prompts_without_a_reference_are_refused_before_anything_is_loaded(place, tmp_path):
    judge = tmp_path / "judge.yaml"
    judge.write_text("kind: numeric-answer\nreference: answer\n")
    assert len(read_all(place / "prompts.jsonl", Prompt)) == 24
    message = train(place, tmp_path / "run", judge)
    assert "cannot verify responses to 24 of the 24 prompts of --prompts" in message
    assert "it has no metadata" in message and not (tmp_path / "run").exists()
