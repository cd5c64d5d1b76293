"""Tests of sums, gates and routes of judges against plain sums; failures have no score."""

import itertools
import json
from typing import Any

import pytest
import yaml

from alignment.commands.annotate import main as annotate
from alignment.judges.kinds.judge_kind import JudgeConfig, JudgeContext, component_scores
from alignment.judges.kinds.program_judge import ProgramJudge
from alignment.judges.kinds.registry import JUDGE_KINDS, read_judge
from alignment.judges.questions import Question
from alignment.record_files import read_all
from alignment.records import Message, Outcome, Pair, Prompt, Response, Verdict
from alignment.rl.judge_rewards import scores_by_component
from alignment.rl.metrics import component_means
from alignment.rl.resident_models import resident_models
from alignment.rounding import EXACT
from megatron_ext.errors import LimitExceeded, UserError
from tests.alignment.chat_model import write_rows
from tests.alignment.endpoints.endpoint import Endpoint, chat

NUMBER = {"kind": "numeric-answer", "reference": "answer"}


class Word:
    """Judge that scores by the number after a letter: "a3 b9"; "b?" fails, "b!" is unparseable."""

    calls: list[str] = []

    def __init__(self, letter):
        self.letter, self.identity = letter, letter

    def verdict(self, item, swapped=False, sample=0):
        self.calls.append(f"{self.letter}:{item.id}")
        value = {word[0]: word[1:] for word in item.text.split()}[self.letter]
        if value in ("?", "!"):
            outcome = Outcome.FAILED if value == "?" else Outcome.UNPARSEABLE
            return Verdict(item.id, outcome, reason=f"{value} occurs", judge=self.identity)
        return Verdict(item.id, Outcome.SCORE, float(value), judge=self.identity)


class WordConfig(JudgeConfig):
    """Configuration of the judge."""

    kind: str = "word"

    def open(self, context):
        return ProgramJudge(Word(self.name[0]))


@pytest.fixture(autouse=True)
def _word_judge(monkeypatch):
    monkeypatch.setitem(JUDGE_KINDS, "word", WordConfig)
    Word.calls.clear()


def read(folder, content, name="judge"):
    file = folder / f"{name}.yaml"
    file.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return read_judge(str(file))


def ask(config, folder, *texts, metadata=None):
    metadata = metadata or [{}] * len(texts)
    responses = [
        Response(str(i), Prompt(str(i), [Message("user", "?")], metadata=m), text)
        for i, (text, m) in enumerate(zip(texts, metadata))
    ]
    judge = config.open(JudgeContext(False, folder))
    verdicts = judge.judge([Question(response) for response in responses])
    return verdicts, [dict(component_scores(judge, verdict)) for verdict in verdicts]


def components(**parts):
    return {"kind": "sum", "components": {n: {"kind": "word"} | p for n, p in parts.items()}}


@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (1, -0.25), (-1, -2), (0, 1), (0.1, 0.2)])
def test_normalized_sum_is_the_mean_over_scores_turned_where_the_weight_is_negative(
    tmp_path, weights
):
    config = read(tmp_path, components(a={"weight": weights[0]}, b={"weight": weights[1]}))
    pairs = list(itertools.product([0, 3.5, 9], repeat=2))
    verdicts, parts = ask(config, tmp_path, *(f"a{a} b{b}" for a, b in pairs))
    sizes = [abs(weight) for weight in weights]
    for (a, b), verdict, part in zip(pairs, verdicts, parts):
        turned = [s if w >= 0 else 9 - s for s, w in zip((a, b), weights)]
        expected = sum(w * s for w, s in zip(sizes, turned)) / sum(sizes)
        assert verdict.score == pytest.approx(expected, rel=EXACT, abs=EXACT)
        assert part == {"a": a, "b": b}


def test_sum_without_normalization_is_the_sum(tmp_path):
    plain = components(a={"weight": 0.5}, b={"weight": 0.25}) | {"normalize": False}
    verdicts, _ = ask(read(tmp_path, plain), tmp_path, "a8 b4", "a9 b9")
    assert [v.score for v in verdicts] == [5.0, 6.75]
    for weights, scale in (((1, 1), "between 0 and 18"), ((1, -0.5), "between -4.5 and 9")):
        bad = components(a={"weight": weights[0]}, b={"weight": weights[1]}) | {"normalize": False}
        with pytest.raises(UserError, match=f"{scale}, outside of 0 to 9"):
            read(tmp_path, bad)


def test_component_behind_a_gate_is_called_only_where_it_is_open(tmp_path):
    gated = {"only_if": "a", "at_least": 5, "otherwise": 2, "weight": 3}
    config = read(tmp_path, components(a={}, b=gated))
    verdicts, parts = ask(config, tmp_path, "a5 b9", "a4 b9", "a4 b?", "a? b9")
    assert [v.score for v in verdicts] == [(5 + 27) / 4, (4 + 6) / 4, (4 + 6) / 4, None]
    assert parts == [{"a": 5, "b": 9}, {"a": 4}, {"a": 4}, {}]
    assert verdicts[3].outcome is Outcome.FAILED and verdicts[3].reason == "a: ? occurs"
    assert [one for one in Word.calls if one[0] == "b"] == ["b:0"]


def test_gate_of_a_gate_has_its_stated_score_where_the_first_is_closed(tmp_path):
    for otherwise, expected in ((0, [9.0, 0.0]), (9, [9.0, (0 + 9 + 9) / 3])):
        config = read(
            tmp_path,
            components(a={}, b={"only_if": "a", "otherwise": otherwise}, c={"only_if": "b"}),
        )
        verdicts, _ = ask(config, tmp_path, "a9 b9 c9", "a0 b9 c9")
        assert [v.score for v in verdicts] == expected


def test_weight_zero_is_a_gate_alone(tmp_path):
    config = read(tmp_path, components(a={"weight": 0}, b={"only_if": "a"}))
    verdicts, _ = ask(config, tmp_path, "a9 b4", "a8 b4")
    assert [v.score for v in verdicts] == [4.0, 0.0]


def test_failure_of_a_component_is_never_scored(tmp_path):
    config = read(tmp_path, components(a={"weight": 0.001}, b={}))
    verdicts, parts = ask(config, tmp_path, "a? b9", "a! b9", "a! b?", "a1 b9")
    assert [v.outcome for v in verdicts] == ["failed", "unparseable", "failed", "score"]
    assert verdicts[2].reason == "a: ! occurs; b: ? occurs" and parts[0] == {"b": 9}


def test_rows_go_to_the_judge_of_their_column(tmp_path):
    routes = {"math": NUMBER, "1": {"kind": "word"}, "true": {"kind": "word"}}
    config = read(tmp_path, {"kind": "route", "column": "task", "routes": routes})
    rows: list[dict[str, Any]] = [
        {"task": "math", "answer": 4},
        {"task": 1},
        {"task": True},
        {"task": "chat"},
        {},
    ]
    prompts = [Prompt(str(i), [Message("user", "?")], metadata=m) for i, m in enumerate(rows)]
    message = (
        "for 2 of the 5 prompts of --prompts, the first being '3' with 'chat' in the column "
        "'task'; its routes are math, 1, true"
    )
    with pytest.raises(UserError, match=message):
        config.check_prompts(prompts, "--prompts")
    config.check_prompts(prompts[:3], "--prompts")
    texts = ["4", "15", "t7", "x", "x"]
    verdicts, parts = ask(config, tmp_path, *texts, metadata=rows)
    assert [v.score for v in verdicts] == [9, 5, 7, None, None]
    assert parts == [{"math": 9}, {"1": 5}, {"true": 7}, {}, {}]
    assert verdicts[3].reason == "no route for the column 'task'"
    rest = {"kind": "route", "column": "task", "routes": {"math": NUMBER},
            "default": {"kind": "exact-answer", "reference": "task"}}  # fmt: skip
    verdicts, parts = ask(read(tmp_path, rest), tmp_path, "4", "chat",
                          metadata=[rows[0], rows[3]])  # fmt: skip
    assert parts == [{"math": 9}, {"default": 9}]
    with pytest.raises(UserError, match="cannot verify responses to 1 of the 1 prompts"):
        read(tmp_path, rest).check_prompts([prompts[4]], "--prompts")


def test_parts_are_files_or_inline_and_nest(tmp_path):
    (tmp_path / "number.yaml").write_text(yaml.safe_dump(NUMBER))
    content = f"""
        kind: sum
        components:
          right: {{file: {tmp_path}/number.yaml, weight: 2}}
          task:
            only_if: right
            kind: route
            column: task
            routes: {{long: {{kind: pattern, pattern: "..."}}}}
            default: {{kind: pattern, pattern: "4"}}
        """
    config = read(tmp_path, content)
    rows = [{"answer": 4, "task": "long"}, {"answer": 4}, {"answer": 5}]
    verdicts, parts = ask(config, tmp_path, "004", "4", "4", metadata=rows)
    assert [v.score for v in verdicts] == [9, 9, 0]
    assert parts == [
        {"right": 9, "task": 9, "task/long": 9},
        {"right": 9, "task": 9, "task/default": 9},
        {"right": 0},
    ]
    assert component_means(parts, "component") == {
        "component/right": 6, "component/task": 9, "component/task/default": 9,
        "component/task/long": 9,
    }  # fmt: skip
    judge = config.open(JudgeContext(False, tmp_path))
    [verdict, _, _] = verdicts
    assert scores_by_component([judge], ["x"], [verdict]) == parts[0]
    both = scores_by_component([judge, judge], ["x", "x"], [verdict, verdict])
    assert both["x-1"] == both["x-2"] == 9 and both["x-2/task/long"] == 9


def test_settings_that_verdicts_depend_on_must_match_on_resume(tmp_path):
    plain = components(a={}, b={"weight": 2})
    first, again = read(tmp_path, plain), read(tmp_path, plain, "other")
    assert first.resume_settings() == again.resume_settings()
    context = JudgeContext(False, tmp_path)
    heavier = read(tmp_path, components(a={}, b={"weight": 3}))
    assert first.resume_settings() != heavier.resume_settings()
    assert first.open(context).identity == again.open(context).identity
    assert first.open(context).identity != heavier.open(context).identity
    slow = {"kind": "sum", "components": {"a": {"kind": "pattern", "pattern": "x", "timeout": 5}}}
    fast = {"kind": "sum", "components": {"a": {"kind": "pattern", "pattern": "x", "timeout": 9}}}
    assert read(tmp_path, slow).resume_settings() == read(tmp_path, fast).resume_settings()
    json.dumps(first.summary())


def test_models_of_components_are_resident(tmp_path):
    local = {"kind": "local", "model": "m", "thinking": "asked"}
    read(tmp_path, {"kind": "sum", "components": {"a": {"kind": "word"}, "b": local}})
    [model] = resident_models(None, [str(tmp_path / "judge.yaml")])
    assert (model.name, model.model) == ("judge b", "m")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"kind": "sum"}, "needs components. Add the key"),
        ({"kind": "sum", "components": {}}, "components must be a mapping from names"),
        ({"kind": "sum", "components": {"a": 5}}, "a must be a mapping with kind or file, not 5"),
        ({"kind": "sum", "components": {"a": {}}}, "a needs kind or file"),
        (components(a={"kind": "numeric-anser"}), "Did you mean numeric-answer?"),
        (
            components(a={"wieght": 1}),
            "a: wieght is not a key of a component. Did you mean weight?",
        ),
        (components(a={"colour": 1}), "colour is not a key of a judge of kind word"),
        (components(a={"weight": "2"}), "a: weight must be a number, not '2'"),
        (components(a={"weight": float("nan")}), "a: weight must be a number, not nan"),
        (components(a={"weight": 0}), "all weights are 0"),
        (
            components(a={"only_if": "b"}, b={}),
            "a has only_if: b, which is not a component before it",
        ),
        (components(a={}, b={"otherwise": 1}), "b: at_least and otherwise require only_if"),
        (components(a={}, b={"only_if": "a", "at_least": 10}), "a score from 0 to 9, not 10"),
        (components(a={"kind": None, "file": "none.yaml"}), "a names a file"),
        ({"kind": "sum", "components": {"a": {"file": "none.yaml"}}}, "none.yaml cannot be read"),
        ({"kind": "route", "column": "task"}, "needs routes. Add the key"),
        ({"kind": "route", "column": "task", "routes": []}, "routes must be a mapping"),
        ({"kind": "route", "routes": {"a": {"kind": "word"}}}, "needs column. Add the key"),
        (
            {"kind": "route", "column": "t", "routes": {"a": NUMBER}, "default": 5},
            "default must be",
        ),
    ],
)
def test_mistakes_are_answered_by_a_sentence(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and str(error.value).endswith((".", "?")), error.value
    assert str(error.value).startswith(f"{tmp_path}/judge.yaml: ")


def test_file_that_contains_itself_is_refused(tmp_path):
    content = {"kind": "sum", "components": {"a": {"file": str(tmp_path / "judge.yaml")}}}
    with pytest.raises(UserError, match="contains itself"):
        read(tmp_path, content)


def test_annotate_takes_a_sum_and_prefers_the_higher_score_of_a_pair(tmp_path):
    short = {"kind": "pattern", "pattern": "^.{0,3}$", "only_if": "right", "otherwise": 0}
    read(tmp_path, {"kind": "sum", "components": {"right": NUMBER, "short": short}})
    prompt = Prompt("p", [Message("user", "2 + 2?")], metadata={"answer": 4})
    rows = [Response(str(i), prompt, text) for i, text in enumerate(["4", "It is 4", "5"])]
    items = write_rows(tmp_path / "items.jsonl", rows)
    command = ["--judge", str(tmp_path / "judge.yaml"), "--output", str(tmp_path / "out.jsonl")]
    assert annotate([*command, "--input", str(items)]) == 0
    verdicts = read_all(tmp_path / "out.jsonl", Verdict)
    assert [v.score for v in verdicts] == [9, 4.5, 0]
    assert json.loads(verdicts[1].answer) == {"right": 9, "short": 0}
    pairs = write_rows(tmp_path / "pairs.jsonl", [Pair("x", prompt, "4", "5")])
    assert annotate([*command, "--input", str(pairs), "--overwrite"]) == 0
    both = read_all(tmp_path / "out.jsonl", Verdict)
    assert [(v.preferred, v.swapped) for v in both] == [("first", False), ("first", True)]
    assert json.loads(both[0].answer) == {"first": 9, "second": 0}


def test_gold_that_is_a_component_of_the_rewards_is_warned_about(tmp_path):
    from alignment.commands.policy_judges import shared_with_gold

    proxy = read(tmp_path, {"kind": "sum", "components": {"a": NUMBER, "b": {"kind": "word"}}})
    gold, other = read(tmp_path, NUMBER, "gold"), read(tmp_path, {"kind": "exact-answer"}, "o")
    specs = {"proxy": [proxy], "gold": [gold], "second_gold": []}
    assert "--gold names a judge that --judge names too" in (shared_with_gold(specs) or "")
    assert shared_with_gold(specs | {"gold": [other]}) is None


def test_annotate_asks_the_endpoints_of_a_sum_where_their_gates_are_open(tmp_path, capsys):
    endpoint = {
        "kind": "endpoint", "model": "m", "expected_score": False, "only_if": "right",
        "template": str(tmp_path / "pointwise-brief.txt"), "price_in": 1000.0, "price_out": 0.0,
        "max_cost": 1.0,
    }  # fmt: skip
    (tmp_path / "pointwise-brief.txt").write_text(
        "=== user ===\n{mark} <item> {prompt} {response} {answer}\n"
    )
    prompts = [Prompt(str(i), [Message("user", f"{i}?")], metadata={"answer": i}) for i in range(6)]
    rows = [Response(str(i), p, f"{i % 3} or {i % 3}") for i, p in enumerate(prompts)]
    items = write_rows(tmp_path / "items.jsonl", rows)
    command = [
        "--judge", str(tmp_path / "judge.yaml"), "--output", str(tmp_path / "out.jsonl"),
        "--input", str(items),
    ]  # fmt: skip
    with Endpoint() as server:
        server.answer = lambda text: chat("6")
        parts: dict[str, Any] = {"right": NUMBER, "grader": endpoint | {"url": server.url}}
        read(tmp_path, {"kind": "sum", "components": parts})
        with pytest.raises(UserError, match="whose files state it"):
            annotate([*command, "--max-cost", "1"])
        before = set(tmp_path.iterdir())
        assert annotate([*command, "--dry-run"]) == 0
        assert not server.calls and set(tmp_path.iterdir()) == before
        planned = capsys.readouterr().out
        assert "grader: 6 questions, 0 answered before, at most: a gate decides" in planned
        assert "calls          6\n" in planned and "$1.00 left" in planned
        assert annotate(command) == 0
        assert sum(server.answered.values()) == 3
        assert annotate([*command, "--overwrite"]) == 0
        assert sum(server.answered.values()) == 3  # answers are stored
        assert annotate([*command, "--dry-run"]) == 0
        assert "grader: 6 questions, 3 answered before, at most" in capsys.readouterr().out
        parts["grader"]["max_cost"] = 0.31
        read(tmp_path, {"kind": "sum", "components": parts})
        write_rows(tmp_path / "items.jsonl", [*rows, Response("n", prompts[1], "new 1")])
        with pytest.raises(LimitExceeded, match=r"max_cost 0\.31 does not .* \$0\.3000"):
            annotate([*command, "--overwrite"])
    verdicts = read_all(tmp_path / "out.jsonl", Verdict)
    assert [v.score for v in verdicts] == [7.5, 7.5, 7.5, 0, 0, 0]


def test_dry_run_counts_the_calls_of_each_endpoint(tmp_path, capsys):
    grader = {
        "kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m", "expected_score": False,
        "answer_tokens": 8.0, "price_in": 0.0, "price_out": 1e6 / 8,
    }  # fmt: skip
    tree = {
        "kind": "sum",
        "components": {
            "all": grader,
            "chosen": {
                "kind": "route", "column": "task", "routes": {"math": NUMBER, "chat": grader},
            },
        },
    }  # fmt: skip
    prompts = [
        Prompt(str(i), [Message("user", f"{i}?")], metadata={"answer": 1, "task": task})
        for i, task in enumerate(["math", "chat", "math", "chat", "chat"])
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", [Pair(p.id, p, "1", "2") for p in prompts])
    command = ["--judge", str(tmp_path / "judge.yaml"), "--output", str(tmp_path / "out.jsonl")]
    read(tmp_path, tree)
    assert annotate([*command, "--input", str(pairs), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    # Each pair is two responses; both orders of a pair ask about the same ones.
    assert "all: 20 questions, 0 answered before\n" in planned and "calls          10\n" in planned
    assert "chosen/chat: 12 questions, 0 answered before\n" in planned
    assert "calls          6\n" in planned and planned.count("at most: a gate") == 0
    assert "together: 16 calls, $16.00 expected\n" in planned


def test_pair_of_equal_scores_is_a_tie_and_one_without_a_score_fails(tmp_path):
    config = read(tmp_path, components(a={}, b={}))
    judge = config.open(JudgeContext(True, tmp_path))
    prompt = Prompt("p", [Message("user", "?")])
    cases = [("a9 b0", "a0 b9"), ("a9 b?", "a0 b0"), ("a1 b1", "a1 b2"), ("a! b1", "a1 b2")]
    pairs = [Pair(str(i), prompt, *texts) for i, texts in enumerate(cases)]
    verdicts = judge.judge([Question(pair, swapped=True) for pair in pairs])
    assert [v.outcome for v in verdicts] == ["tie", "failed", "preference", "unparseable"]
    assert verdicts[2].preferred == "second" and verdicts[1].reason == "b: ? occurs"
    assert judge.judge([]) == []
