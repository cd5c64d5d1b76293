"""Tests of rewards by judges: means of scores, and win rates within a group."""

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.judges.kinds.combined import SumConfig
from alignment.judges.kinds.combined_judge import SumJudge
from alignment.judges.questions import Question
from alignment.records import Message, Outcome, Pair, Prompt, Side, Verdict
from alignment.rl.advantages import group_advantages
from alignment.rl.judge_rewards import JudgeReward
from alignment.rl.rollouts import Rollout
from alignment.rl.tasks import PromptTask
from alignment.rounding import EXACT


class Longest:
    """Judge that prefers length and fails on texts that begin with an x."""

    identity = "longest"

    def judge(self, questions, check=lambda: None):
        return [self._pair(q) if hasattr(q.item, "first") else self._score(q) for q in questions]

    def _score(self, question):
        text = question.item.text
        if text.startswith("x"):
            return Verdict(question.item.id, Outcome.UNPARSEABLE, reason="an x")
        return Verdict(question.item.id, Outcome.SCORE, float(len(text)))

    def _pair(self, question):
        first, second = question.item.first, question.item.second
        of = {"item": question.item.id, "swapped": question.swapped}
        if "x" in (first[:1], second[:1]):
            return Verdict(**of, outcome=Outcome.FAILED, reason="an x")
        if len(first) == len(second):
            return Verdict(**of, outcome=Outcome.TIE)
        side = Side.FIRST if len(first) > len(second) else Side.SECOND
        return Verdict(**of, outcome=Outcome.PREFERENCE, preferred=side)


LETTERS = SimpleNamespace(decode=lambda tokens, **_: "".join(map(chr, tokens)))


def group(*texts):
    task = PromptTask("p", [1], Prompt("p", (Message("user", "say"),)))
    rollouts = [Rollout("p", i, [*map(ord, t), 0], [], True) for i, t in enumerate(texts)]
    return task, rollouts


def test_judge_reward_is_the_mean_of_judges_that_all_gave_a_score():
    groups = [group("aa", "x", "")]
    always = SimpleNamespace(
        judge=lambda questions, check: [Verdict(q.item.id, Outcome.SCORE, 9.0) for q in questions]
    )
    [[aa, x, empty]] = JudgeReward([Longest()], LETTERS, False)(groups, lambda: None)
    assert (aa.reward, x.reward, empty.reward) == (2.0, None, 0.0)
    assert x.outcome == "unparseable" and x.details["reasons"] == ["an x"]
    [[aa, x, empty]] = JudgeReward([Longest(), always], LETTERS, False)(groups, lambda: None)
    assert (aa.reward, x.reward, empty.reward) == (5.5, None, 4.5)
    assert x.outcome == "unparseable" and x.details["reasons"] == ["an x"]


def test_win_rate_counts_only_matches_with_a_verdict():
    texts = ["a", "bbb", "x", "cc", "dd"]
    [rewards] = JudgeReward([Longest()], LETTERS, True)([group(*texts)], lambda: None)
    wins: dict[str, list[float]] = {text: [] for text in texts}
    for a, b in combinations([text for text in texts if text != "x"], 2):
        wins[a].append(0.5 + 0.5 * np.sign(len(a) - len(b)))
        wins[b].append(0.5 + 0.5 * np.sign(len(b) - len(a)))
    assert [r.reward for r in rewards] == [np.mean(wins[t]) if t != "x" else None for t in texts]
    assert rewards[2].outcome == "failed"


def test_win_rate_leaves_out_a_pair_with_one_order_missing():
    """The judge prefers the first response and fails on some swapped pairs."""

    def judge(questions, check):
        return [
            Verdict(q.item.id, Outcome.FAILED, swapped=True, reason="away")
            if q.swapped and "0" in q.item.id
            else Verdict(
                q.item.id, Outcome.PREFERENCE, swapped=q.swapped,
                preferred=Side.SECOND if q.swapped else Side.FIRST,
            )
            for q in questions
        ]  # fmt: skip

    groups = [group("same", "same", "same", "same")]
    [rewards] = JudgeReward([SimpleNamespace(judge=judge)], LETTERS, True)(groups, lambda: None)
    assert [r.reward for r in rewards] == [None, 0.5, 0.5, 0.5]  # not 1, 0.67, 0.33, 0
    assert rewards[0].outcome == "failed"


def test_judge_reward_has_the_rounding_error_of_its_judges():
    exact: Any = SimpleNamespace(
        judge=lambda questions, check: [Verdict(q.item.id, Outcome.SCORE, 7.5) for q in questions],
        rounding_error=EXACT,
    )
    coarse: Any = SimpleNamespace(judge=exact.judge, rounding_error=2**-8)
    expected = [([exact], EXACT), ([coarse], 2**-8), ([exact, coarse], 2**-8)]
    for judges, error in expected:
        [[one]] = JudgeReward(judges, LETTERS, False)([group("a")], lambda: None)
        assert one.error == pytest.approx(7.5 * error)
    [rewards] = JudgeReward([Longest()], LETTERS, True)([group("a", "bb")], lambda: None)
    assert [one.error for one in rewards] == [EXACT] * 2  # win rates


class Scores:
    """Judge whose score is the number that a text has, of the precision of bf16."""

    identity = "scores"
    rounding_error = 2.0**-8

    def judge(self, questions, check=lambda: None):
        return [Verdict(q.item.id, Outcome.SCORE, float(q.item.text)) for q in questions]


def test_rounding_of_a_score_that_is_subtracted_is_no_advantage():
    numeric = {"kind": "numeric-answer", "reference": "answer"}
    components: Any = {
        "quality": numeric | {"weight": 1},
        "sycophancy": numeric | {"weight": -1},
    }
    config = SumConfig(name="both", components=components)
    zero: Any = SimpleNamespace(
        judge=lambda questions, check: [Verdict(q.item.id, Outcome.SCORE, 0.0) for q in questions],
        rounding_error=EXACT,
        identity="zero",
    )
    judge = SumJudge(config, {"quality": zero, "sycophancy": Scores()})

    def rewards(*texts):
        [results] = JudgeReward([judge], LETTERS, False)([group(*texts)], lambda: None)
        values = [one.reward for one in results]
        return values, group_advantages(values, ["p"] * 4, errors=[one.error for one in results])

    # In bf16 a score near 9 has an error of 9 / 256 = 0.035, half of which remains in the mean.
    values, advantages = rewards("8.97", "8.99", "8.96", "8.98")
    assert values == pytest.approx([0.015, 0.005, 0.02, 0.01])
    assert advantages == pytest.approx([0.0] * 4)
    _, advantages = rewards("8.97", "8.99", "8.5", "8.98")
    assert max(advantages) > 1

    def preferred(first, second):
        pair = Pair("p", Prompt("p", (Message("user", "say"),)), first, second)
        [verdict] = judge.judge([Question(pair)])
        return verdict.preferred

    assert preferred("8.97", "8.99") is None
    assert preferred("8.5", "8.99") is Side.FIRST
