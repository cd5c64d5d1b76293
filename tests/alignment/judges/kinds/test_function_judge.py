"""Tests of function judges: scores, missing scores and errors."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.commands.annotate import main
from alignment.judges.kinds.function import FunctionJudgeConfig
from alignment.judges.kinds.function_judge import FunctionJudge
from alignment.judges.kinds.judge_kind import JudgeContext
from alignment.judges.kinds.registry import read_judge
from alignment.judges.questions import Question
from alignment.record_files import read_all
from alignment.records import Message, Outcome, Pair, Prompt, Response, Verdict
from megatron_ext.errors import TooFewResults, UserError
from tests.alignment.chat_model import write_rows
from tests.distributed import run_ranks

CHECKS = """
def words(response):
    if response.text == "silent":
        return None
    return len(response.text.split()) / len(response.prompt.messages)

def broken(response):
    raise ValueError("no idea")

SAID = {"nan": float("nan"), "inf": float("inf"), "text": "many", "digit": "7", "list": [],
        "bool": True}

def stuck(response):
    if response.text == "catches all":
        while True:
            try:
                pass
            except:
                pass
    if response.text == "never leaves C":
        return sum(range(10**12))
    if response.text == "ends its process":
        raise SystemExit(4)
    return 3

def out_of_scale(response):
    return float(response.text)

def odd(response):
    return SAID[response.text]
"""
PROMPT = Prompt("p", (Message("user", "say"),))
ITEMS = [Response("a", PROMPT, "one two three"), Response("b", PROMPT, "silent")]


@pytest.fixture
def checks(tmp_path):
    file = tmp_path / "checks.py"
    file.write_text(CHECKS)
    return file


def test_function_judge_returns_score_or_unparseable(checks):
    judge = FunctionJudge(f"{checks}:words")
    scored, silent = map(judge.verdict, ITEMS)
    assert (scored.outcome, scored.score) == (Outcome.SCORE, 3.0)
    assert (silent.outcome, silent.score) == (Outcome.UNPARSEABLE, None)
    failed = FunctionJudge(f"{checks}:broken").verdict(ITEMS[0])
    assert (failed.outcome, failed.reason) == (Outcome.FAILED, "ValueError: no idea")
    assert judge.identity != FunctionJudge(f"{checks}:broken").identity
    with pytest.raises(UserError, match="scores responses, and these are pairs"):
        judge.verdict(Pair("x", PROMPT, "a", "b"))


@pytest.mark.parametrize("name", ["checks.py:nothing", "nowhere.py:words", "words"])
def test_missing_function_is_refused(checks, name):
    with pytest.raises(UserError, match="cannot be loaded"):
        FunctionJudge(str(checks.parent / name))


@pytest.mark.parametrize("message", ["nan", "inf", "text", "digit", "list", "bool"])
def test_function_result_that_is_no_number_is_a_failed_call(checks, message):
    verdict = FunctionJudge(f"{checks}:odd").verdict(Response("a", PROMPT, message))
    assert (verdict.outcome, verdict.score) == (Outcome.FAILED, None)
    assert verdict.reason.startswith(("ValueError: ", "TypeError: "))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("words = 3", "TypeError: words is 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(1)", "SystemExit"),
        ("words = undefined", "NameError"),
    ],
)
def test_file_without_the_function_is_refused(checks, source, message):
    checks.write_text(source)
    with pytest.raises(UserError, match=rf"checks\.py:words cannot be loaded \({message}"):
        FunctionJudge(f"{checks}:words")


def test_function_call_beyond_time_limit_fails_and_next_is_scored(checks):
    judge = FunctionJudge(f"{checks}:stuck", timeout=0.3)
    texts = ["fine", "catches all", "fine", "never leaves C", "ends its process", "fine"]
    verdicts = [judge.verdict(Response("a", PROMPT, text)) for text in texts]
    assert [v.score for v in verdicts] == [3.0, None, 3.0, None, None, 3.0]
    assert verdicts[1].reason == verdicts[3].reason == "no score within 0.3 seconds"
    assert verdicts[4].reason == "the function ended its process (exit status 4)"


def test_endless_function_ends_annotate_with_status_3(checks, tmp_path):
    items = [Response(str(n), PROMPT, "catches all") for n in range(9)]
    file = write_rows(tmp_path / "items.jsonl", items)
    flags = ["--judge", f"function:{checks}:stuck", "--timeout", "0.05", "--max-failed", "1"]
    begin = time.monotonic()
    with pytest.raises(TooFewResults, match=r"0\.05 seconds 5 times in a row") as ended:
        main(["--input", str(file), "--output", str(tmp_path / "out.jsonl"), *flags])
    assert ended.value.status == 3 and time.monotonic() - begin < 30
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("message", "scale", "score"),
    [("9", None, 9.0), ("7.5", None, 7.5), ("0", [0, 100], 0.0), ("40", [0, 100], 3.6),
     ("100", [0, 100], 9.0), ("1", [-1, 1], 9.0), ("0", [-1, 1], 4.5), ("9.5", None, None),
     ("-1", None, None), ("101", [0, 100], None)],
)  # fmt: skip
def test_function_scores_are_mapped_from_their_scale_and_never_clamped(
    checks, message, scale, score
):
    judge = FunctionJudge(f"{checks}:out_of_scale", scale)
    verdict = judge.verdict(Response("a", PROMPT, message))
    assert verdict.score == (score if score is None else pytest.approx(score, rel=1e-12))
    if score is None:
        assert verdict.outcome is Outcome.FAILED and "outside of the scale" in verdict.reason
    judge.close()


def test_function_that_always_raises_ends_annotate_with_status_3(checks, tmp_path):
    items = write_rows(tmp_path / "items.jsonl", ITEMS)
    with pytest.raises(TooFewResults, match=r"2 of 2 questions .* ValueError: no idea"):
        main(["--input", str(items), "--output", str(tmp_path / "out.jsonl"),
              "--judge", f"function:{checks}:broken"])  # fmt: skip
    assert len(read_all(tmp_path / "out.jsonl", Verdict)) == 2  # for a look at each


def test_function_judge_annotates_and_rewards(checks, tmp_path):
    items = write_rows(tmp_path / "items.jsonl", ITEMS)
    judge = f"function:{checks}:words"
    files = ["--input", str(items), "--output", str(tmp_path / "out.jsonl")]
    main([*files, "--judge", judge, "--max-failed", "0.5"])
    message = read_all(tmp_path / "out.jsonl", Verdict)
    assert [verdict.score for verdict in message] == [3.0, None]
    about = json.loads((tmp_path / "out.jsonl.about.json").read_text())
    assert about["judge"] == {"function": judge}

    spec = tmp_path / "judge.yaml"
    spec.write_text(f"kind: function\nfunction: {checks}:words\n")
    config = read_judge(str(spec))
    opened = config.open(JudgeContext(False, tmp_path))
    assert opened.judge([Question(item) for item in ITEMS]) == message
    engine: Any = object()
    with pytest.raises(UserError, match="cannot give a pairwise reward"):
        config.open(JudgeContext(True, tmp_path, engine))


def test_read_agreement_returns_measures_or_refuses_file(tmp_path):
    spec = tmp_path / "judge.yaml"
    spec.write_text("kind: rule\nrule_text: x\nagreement: " + str(tmp_path / "agreement.json"))
    with pytest.raises(UserError, match=r"is not an agreement\.json"):
        read_judge(str(spec)).read_agreement()
    figures = {"alpha_interval": {"value": 0.5, "low": 0.4}}
    (tmp_path / "agreement.json").write_text(json.dumps({"all": {"agreement": figures}}))
    assert read_judge(str(spec)).read_agreement() == {"alpha_interval": 0.5}


def asked_on_two_ranks_of_one_share(file: Path) -> float | None:
    """Return, on a rank, the score of a function that differs between processes."""
    policy: Any = SimpleNamespace(data_rank=0, data_size=1)
    spec = FunctionJudgeConfig(name="f", function=f"{file}:score", scale=[0, 1])
    judge = spec.open(JudgeContext(False, file.parent, policy))
    prompt = Prompt("p", (Message("user", "hello"),))
    [verdict] = judge.judge([Question(Response("r", prompt, "yes"))])
    return verdict.score


def test_function_judge_returns_equal_scores_on_ranks_of_a_share(tmp_path: Path) -> None:
    file = tmp_path / "draws.py"
    file.write_text("import random\n\ndef score(response):\n    return random.random()\n")
    first, second = run_ranks(asked_on_two_ranks_of_one_share, 2, file)
    assert first is not None and first == second
