"""A program as a judge: its scores, its silence and its errors."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.judges.annotate import main
from alignment.judges.function_judge import FunctionJudge
from alignment.judges.questions import Question
from alignment.judges.rows import read_all
from alignment.policies.judges import JudgeSpec, open_judge
from alignment.records import Message, Outcome, Pair, Prompt, Response, Verdict
from megatron_ext.errors import UserError
from tests.alignment.chat_model import write_rows
from tests.distributed import run_ranks

CHECKS = """
def words(response):
    if response.text == "silent":
        return None
    return len(response.text.split()) / len(response.prompt.messages)

def broken(response):
    raise ValueError("no idea")

SAID = {"nan": float("nan"), "inf": float("inf"), "text": "many", "digit": "7", "list": []}

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


def test_scores_and_what_has_none(checks):
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
def test_what_is_not_there_is_told(checks, name):
    with pytest.raises(UserError, match="cannot be loaded"):
        FunctionJudge(str(checks.parent / name))


@pytest.mark.parametrize("said", ["nan", "inf", "text", "digit", "list"])
def test_what_is_no_number_is_a_failed_call(checks, said):
    verdict = FunctionJudge(f"{checks}:odd").verdict(Response("a", PROMPT, said))
    assert (verdict.outcome, verdict.score) == (Outcome.FAILED, None)
    assert verdict.reason.startswith(("ValueError: ", "TypeError: "))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("words = 3", "TypeError: words is 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(1)", "SystemExit"),
        ("words = undefined", "NameError"),
    ],
)
def test_a_file_that_gives_no_function_is_told(checks, source, told):
    checks.write_text(source)
    with pytest.raises(UserError, match=rf"checks\.py:words cannot be loaded \({told}"):
        FunctionJudge(f"{checks}:words")


def test_it_annotates_and_rewards(checks, tmp_path):
    items = write_rows(tmp_path / "items.jsonl", ITEMS)
    judge = f"function:{checks}:words"
    main(["--input", str(items), "--output", str(tmp_path / "out.jsonl"), "--judge", judge])
    told = read_all(tmp_path / "out.jsonl", Verdict)
    assert [verdict.score for verdict in told] == [3.0, None]
    about = json.loads((tmp_path / "out.jsonl.about.json").read_text())
    assert about["judge"] == {"function": judge}

    spec = tmp_path / "judge.yaml"
    spec.write_text(f"kind: function\nfunction: {checks}:words\n")
    read = JudgeSpec.read(str(spec))
    no_engine: Any = None
    opened = open_judge(read, False, no_engine, no_engine, tmp_path)
    assert opened.judge([Question(item) for item in ITEMS]) == told
    with pytest.raises(UserError, match="no pairwise reward"):
        open_judge(read, True, no_engine, no_engine, tmp_path)


def test_the_agreement_of_a_judge_is_read(tmp_path):
    spec = tmp_path / "judge.yaml"
    spec.write_text("kind: rule\nrule_text: x\nagreement: " + str(tmp_path / "agreement.json"))
    with pytest.raises(UserError, match=r"is no agreement\.json"):
        JudgeSpec.read(str(spec)).agreed()
    figures = {"alpha_interval": {"value": 0.5, "low": 0.4}}
    (tmp_path / "agreement.json").write_text(json.dumps({"all": {"agreement": figures}}))
    assert JudgeSpec.read(str(spec)).agreed() == {"alpha_interval": 0.5}


def asked_on_two_ranks_of_one_share(file: Path) -> tuple[float | None, int]:
    """On a rank: the score of a function that says something else to every process."""
    policy: Any = SimpleNamespace(data_rank=0, data_size=1)
    spec = JudgeSpec(kind="function", name="f", function=f"{file}:score")
    judge = open_judge(spec, False, policy, lambda model: policy, file.parent)
    prompt = Prompt("p", (Message("user", "hello"),))
    [verdict] = judge.judge([Question(Response("r", prompt, "yes"))])
    return verdict.score, os.getpid()


def test_ranks_that_share_a_model_have_the_same_rewards(tmp_path: Path) -> None:
    (tmp_path / "pid.py").write_text("import os\n\ndef score(response):\n    return os.getpid()\n")
    (first, own), (second, other) = run_ranks(
        asked_on_two_ranks_of_one_share, 2, tmp_path / "pid.py"
    )
    assert first == second == own != other
