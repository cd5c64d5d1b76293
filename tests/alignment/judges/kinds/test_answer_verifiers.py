"""Tests of answer verifiers: right, wrong and unscored answers."""

import json
import time

import pytest

from alignment.commands.annotate import main as annotate
from alignment.judges.kinds.command_settings import JudgeFlags
from alignment.judges.kinds.judge_kind import JudgeContext
from alignment.judges.kinds.registry import judge_from_flag, read_judge
from alignment.judges.questions import Question
from alignment.record_files import read_all
from alignment.records import Message, Outcome, Pair, Prompt, Response, Verdict
from megatron_ext.errors import UserError
from tests.alignment.chat_model import write_rows


def judge(folder, text, metadata, **settings):
    file = folder / "judge.yaml"
    file.write_text(json.dumps(settings))
    config = read_judge(str(file))
    prompt = Prompt("p", [Message("user", "6 * 7?")], metadata=metadata)
    config.check_prompts([prompt], "--prompts")
    opened = config.open(JudgeContext(False, folder))
    [verdict] = opened.judge([Question(Response("r", prompt, text))])
    return verdict


@pytest.mark.parametrize(
    "text, reference, settings, score",
    [
        ("It is 42.", 42, {}, 9), ("It is 42.", 42.0, {}, 9), ("It is 41.", 42, {}, 0),
        ("#### 72", "9 * 8 = 72\n#### 72", {}, 9), ("-3", "3", {}, 0), ("−3", -3, {}, 9),
        ("", 0, {}, 0), ("none", 0, {}, 0), ("nan", 0, {}, 0), ("1,5", 1.5, {}, 0),
        ("1,5", 1.5, {"decimal": "comma"}, 9), ("1.5", 1.5, {"decimal": "comma"}, 0),
        ("1e400", 1, {}, 0), ("1e400", "1e400", {}, 9), ("٤٢", 42, {}, 9), ("42 cm", 42, {}, 9),
        ("0.333", "1/3", {}, 0), ("0.333", "1/3", {"relative": 0.01}, 9),
        ("0.3333334", "1/3", {}, 9), ("0.5", 0, {"absolute": 0.5}, 9),
        ("0.51", 0, {"absolute": 0.5}, 0),
        ("50%", 50, {}, 9), ("50%", "0.5", {}, 9), ("50", "50%", {}, 9), ("0.5", "50%", {}, 9),
        ("50%", 50, {"percent": "hundredths"}, 0), ("50%", 0.5, {"percent": "ignored"}, 0),
        ("6", [5, 6], {}, 9), (r"\boxed{5x} so 5", 5, {}, 0), ("9" * 100_000, 9, {}, 0),
        ("<think>It is 42.", 42, {}, 0), ("<think>41</think>42", 42, {}, 9),
        (r"Answer: \(42\)", 42, {}, 9), ("The answer is\n\\[\n42\n\\]", 42, {}, 9),
        (r"The answer is \(x = 42\).", r"\(42\)", {}, 9),
    ],
)  # fmt: skip
def test_numeric_answers(tmp_path, text, reference, settings, score):
    verdict = judge(tmp_path, text, {"answer": reference}, kind="numeric-answer",
                    reference="answer", **settings)  # fmt: skip
    assert (verdict.outcome, verdict.score) == (Outcome.SCORE, score), verdict


@pytest.mark.parametrize(
    "text, reference, settings, score",
    [
        ("The answer is (B).", "B", {}, 9), ("The answer is (B).", "b", {"compare": "exact"}, 0),
        ("  Paris\n", "paris", {}, 9), ("Paris, France", "Paris", {}, 0),
        ("New\n York.", ["NYC", "new york"], {}, 9), ("true", True, {}, 9), ("7", 7, {}, 9),
        ("", "x", {}, 0), ("...", "x", {}, 0), ("x²", "x2", {}, 0),
        ("cafe\u0301", "CAFÉ", {}, 9), ("a\nb", "b", {"extract": "last-line"}, 9),
        ("b", "b", {"extract": "boxed"}, 0), ("STRASSE", "straße", {}, 9),
        (r"Answer: \(x+1\)", "x+1", {}, 9), ("x+1", r"\(x+1\)", {}, 9),
    ],
)  # fmt: skip
def test_exact_answers(tmp_path, text, reference, settings, score):
    verdict = judge(tmp_path, text, {"reference": reference}, kind="exact-answer", **settings)
    assert (verdict.outcome, verdict.score) == (Outcome.SCORE, score), verdict


@pytest.mark.parametrize(
    "text, settings, score",
    [
        ("x = 5", {"pattern": r"\d"}, 9), ("five", {"pattern": r"\d"}, 0),
        (" 5\n", {"pattern": r"\d", "match": "full"}, 9),
        ("55", {"pattern": r"\d", "match": "full"}, 0),
        ("Sorry", {"pattern": "sorry", "match": "none"}, 9), ("a\nB", {"pattern": "^b$"}, 0),
        ("Sorry", {"pattern": "sorry", "match": "none", "ignore_case": True}, 0),
        ("a\nB", {"pattern": "^b$", "multiline": True, "ignore_case": True}, 9),
        ("", {"pattern": "^$"}, 9), ("abc", {"column": "form"}, 9), ("b", {"column": "form"}, 0),
    ],
)  # fmt: skip
def test_patterns(tmp_path, text, settings, score):
    verdict = judge(tmp_path, text, {"form": "^a"}, kind="pattern", **settings)
    assert (verdict.outcome, verdict.score) == (Outcome.SCORE, score), verdict


def test_pattern_that_backtracks_too_long_is_a_failed_call(tmp_path):
    begin = time.monotonic()
    verdict = judge(
        tmp_path, "a" * 5000 + "b", {}, kind="pattern", pattern="(a|a|aa)+$", timeout=0.2
    )
    assert verdict.outcome is Outcome.FAILED and "more than 0.2 seconds" in verdict.reason
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "settings, metadata, message",
    [
        (
            {"kind": "numeric-answer"},
            {"refrence": 1},
            "its columns are refrence. Did you mean 'refr",
        ),
        ({"kind": "numeric-answer"}, {}, "the column 'reference'; it has no metadata"),
        ({"kind": "numeric-answer"}, {"reference": "many"}, "'many', which is not a number"),
        ({"kind": "numeric-answer"}, {"reference": True}, "True, which is not a number"),
        ({"kind": "numeric-answer"}, {"reference": float("nan")}, "'nan', which is not a number"),
        ({"kind": "numeric-answer"}, {"reference": []}, "which is not an answer"),
        ({"kind": "exact-answer"}, {"reference": " ."}, "' .', which is not an answer"),
        ({"kind": "exact-answer"}, {"reference": {"a": 1}}, "which is not an answer"),
        (
            {"kind": "pattern", "column": "form"},
            {"form": "("},
            "is not a regular expression: missing",
        ),
        ({"kind": "pattern", "column": "form"}, {"form": 5}, "contains 5, which is not text"),
        ({"kind": "pattern"}, {}, "needs either pattern or column"),
        ({"kind": "pattern", "pattern": "("}, {}, "is not a regular expression"),
        ({"kind": "numeric-answer", "extract": "box"}, {}, "extract is one of 'auto', 'boxed'"),
        ({"kind": "numeric-answer", "absolute": -1}, {}, "absolute must not be negative"),
    ],
)
def test_unverifiable_input_is_refused_before_the_run(tmp_path, settings, metadata, message):
    with pytest.raises(UserError) as error:
        judge(tmp_path, "5", metadata, **settings)
    assert message in str(error.value) and str(error.value).endswith((".", "?")), error.value


def test_settings_that_change_verdicts_change_the_identity_and_must_match(tmp_path):
    flags = JudgeFlags()
    plain = judge_from_flag("numeric-answer:answer", flags)
    again = judge_from_flag("numeric-answer:answer", flags)
    other = judge_from_flag("numeric-answer:solution", flags)
    context = JudgeContext(False, tmp_path)
    assert plain.open(context).identity == again.open(context).identity
    assert plain.open(context).identity != other.open(context).identity
    assert plain.resume_settings()["reference"] == "answer"
    slow = judge_from_flag("pattern", flags).model_copy(update={"timeout": 9.0})
    assert "timeout" not in slow.resume_settings()


def test_annotate_takes_a_verifier_and_names_the_rows_that_lack_a_reference(tmp_path, capsys):
    rows = [
        Response(
            str(i), Prompt(str(i), [Message("user", "?")], metadata={"answer": i}), f"= {i % 2}"
        )
        for i in range(4)
    ]
    items = write_rows(tmp_path / "items.jsonl", rows)
    command = ["--input", str(items), "--output", str(tmp_path / "verdicts.jsonl"), "--judge"]
    assert annotate([*command, "numeric-answer:answer"]) == 0
    verdicts = read_all(tmp_path / "verdicts.jsonl", Verdict)
    assert [v.score for v in verdicts] == [9, 9, 0, 0]
    assert verdicts[2].answer == "answer 0, expected 2"
    with pytest.raises(UserError, match="to 4 of the 4 prompts of --input, first prompt '0'"):
        annotate([*command, "numeric-answer:anser", "--overwrite"])
    pairs = write_rows(tmp_path / "pairs.jsonl", [Pair("x", rows[0].prompt, "0", "1")])
    command[1], command[3] = str(pairs), str(tmp_path / "preferences.jsonl")
    assert annotate([*command, "numeric-answer:answer"]) == 0
    both = read_all(tmp_path / "preferences.jsonl", Verdict)
    assert [(v.preferred, v.swapped) for v in both] == [("first", False), ("first", True)]


def test_instructions_come_from_the_columns_of_ifeval(tmp_path):
    rows = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 2, "relation": "at least", "letter": None}],
    }
    as_json = {name: json.dumps(value) for name, value in rows.items()}
    for metadata in (rows, as_json):
        for text, score, share in (("a b", 9, 9), ("a, b", 0, 4.5), ("a", 0, 4.5), ("", 0, 0)):
            assert judge(tmp_path, text, metadata, kind="instructions").score == score
            partial = judge(tmp_path, text, metadata, kind="instructions", partial=True)
            assert partial.score == share
    assert (
        "not length_constraints:number_words"
        in judge(tmp_path, "a", rows, kind="instructions").answer
    )
    unknown = {"instruction_id_list": ["punctuation:no_coma", "punctuation:no_comma"]}
    with pytest.raises(UserError, match=r"no_coma' has no check; .* Did you mean punct"):
        judge(tmp_path, "a", unknown, kind="instructions")
    assert judge(tmp_path, "a", unknown, kind="instructions", unknown="skip").score == 9
    with pytest.raises(UserError, match="there is no value in the column 'instruction_id_list'"):
        judge(tmp_path, "a", {}, kind="instructions")


def test_programs_are_run_against_the_tests_of_their_row(tmp_path):
    tests = {"test_list": ["assert f(1) == 2", "assert f(2) == 4"]}
    settings = {"kind": "code-tests", "tests": "test_list"}
    right = "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
    verdict = judge(tmp_path, right, tests, **settings)
    assert (verdict.score, verdict.answer) == (9, "2 of 2 tests passed")
    half = right.replace("2 * x", "x + 1")
    assert judge(tmp_path, half, tests, **settings).score == 0
    verdict = judge(tmp_path, half, tests, **settings, partial=True)
    assert verdict.score == 4.5 and verdict.answer.startswith("1 of 2 tests passed; AssertionError")
    assert judge(tmp_path, "I cannot.", tests, **settings).score == 0
    with pytest.raises(UserError, match="cannot be used: no tests in 5"):
        judge(tmp_path, right, {"test_list": 5}, **settings)
