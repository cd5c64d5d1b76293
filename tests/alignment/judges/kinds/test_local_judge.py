"""Tests of local judges: the place of the label in a thinking answer, and missing labels."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignment.engines.protocol import GeneratedResponse
from alignment.judges.formats.labels import SIDES, LabelTokens
from alignment.judges.formats.parsing import Parser
from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.kinds import local_judge as local
from alignment.judges.kinds.local_judge import LocalJudge, TokenizedJudgeFormat
from alignment.judges.questions import Question
from alignment.records import Message, Outcome, Prompt, Response, Side
from alignment.rl.advantages import group_advantages, informative
from tests.alignment.chat_model import make_tokenizer

LIKELY = [math.log(p) for p in (0.0001, 0.0001, 0.0001, 0.2, *[0.0001] * 3, 0.6, 0.0001, 0.0001)]


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Return a judge with the answers `answers` and the label log-probabilities `likely`."""
    monkeypatch.setattr(local, "all_reduce_max", lambda count: count)
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([" 7"])
    engine: Any = SimpleNamespace(answers=[], likely=LIKELY, after=[])

    def generate(prompts, *_):
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in engine.answers]
        return [GeneratedResponse([*row, tokenizer.eos_token_id], [], True) for row in ids]

    def next_log_probs(batch, labels):
        engine.after = [
            tokenizer.decode(row[: int(own.sum())])
            for row, own in zip(batch.tokens, batch.samples >= 0)
        ]
        return torch.tensor(engine.likely).expand(*batch.tokens.shape, len(labels))

    engine.generate, engine.next_log_probs = generate, next_log_probs
    judge_format = TokenizedJudgeFormat(
        judge_prompt("pointwise", True), Parser(thinks=True), tokenizer
    )
    return LocalJudge(engine, judge_format, 10_000)


def ask(judge, *message):
    judge.engine.answers = message
    prompt = Prompt("p", (Message("user", "say"),))
    return judge.judge(
        [Question(Response(str(n), prompt, f"good {n}")) for n in range(len(message))]
    )


def test_local_judge_reads_label_only_after_thinking(judge):
    result = ask(judge, "<think>3 of 4</think>\n7", "<think>3 of 4</think> 7")
    assert result[0].score == pytest.approx((3 * 0.2 + 7 * 0.6) / 0.8, abs=0.01)
    assert [text.endswith("3 of 4</think>\n") for text in judge.engine.after] == [True]
    assert result[1].outcome is Outcome.UNPARSEABLE and result[1].score is None
    assert "not one of the tokens" in result[1].reason and result[1].answer.endswith("</think> 7")


def test_local_judge_asks_equal_questions_once(judge, monkeypatch):
    """Ids do not matter: a model that answers twice differs by rounding."""
    prompt = Prompt("p", (Message("user", "say"),))
    questions = [
        Question(Response(str(n), prompt, text), sample=sample)
        for n, (text, sample) in enumerate([("a", 0), ("b", 0), ("a", 0), ("a", 1), ("b", 0)])
    ]
    calls: list[tuple[tuple[int, ...], int]] = []

    def generate(prompts, sampling, seeds):
        calls.extend(zip(map(tuple, prompts), seeds))
        judge.engine.answers = [f"<think>{seed % 10}</think>\n7" for seed in seeds]
        return ask_all(prompts)

    ask_all = judge.engine.generate
    monkeypatch.setattr(judge.engine, "generate", generate)
    monkeypatch.setattr(judge, "generation_batch_size", 2)
    result = judge.judge(questions)
    assert [verdict.item for verdict in result] == list("01234")
    answers = [verdict.answer for verdict in result]
    assert answers[0] == answers[2] and answers[1] == answers[4] and len(set(calls)) == 3
    assert len(calls) == 3 and [verdict.sample for verdict in result] == [0, 0, 0, 1, 0]
    # The same seeds for the same questions in another call, under other names.
    before = set(calls)
    calls.clear()
    judge.judge([Question(Response("other", prompt, "a"))])
    assert len(calls) == 1 and set(calls) < before


def test_local_judge_scores_equal_responses_equally_in_any_batch(judge):
    """Padding changes the last digits of an engine's log-probabilities."""
    judge.format = replace(judge.format, parser=Parser(thinks=False))
    judge.labels, judge.generation_batch_size = judge.format.label_tokens, 3

    def next_log_probs(batch, labels):
        rows = torch.arange(len(batch.tokens))[:, None, None]
        noise = 2e-7 * (rows + batch.length % 5) * torch.arange(len(labels))
        return torch.tensor(LIKELY) + noise.expand(*batch.tokens.shape, len(labels))

    judge.engine.next_log_probs = next_log_probs
    prompt = Prompt("p", (Message("user", "say"),))
    same = [Question(Response(f"s{n}", prompt, "good")) for n in range(8)]
    others = [Question(Response(f"o{n}", prompt, "good " * n)) for n in range(2, 6)]
    results = [v.score for v in judge.judge([*same[:4], *others, *same[4:]])]
    scores = [*results[:4], *results[-4:]]
    assert len(set(scores)) == 1 and len(set(results)) > 1
    # In two calls, as in a resumed run, they differ by rounding alone.
    apart = [judge.judge([question, *others[:n]])[0].score for n, question in enumerate(same[:4])]
    assert len(set(apart)) > 1
    assert not group_advantages(apart, [0] * 4).any() and not informative(apart, [0] * 4).any()


@pytest.mark.parametrize(
    ("log_probs", "outcome"),
    [
        ([-0.7, -0.7, -5], Outcome.TIE),
        ([-0.7, -0.700001, -5], Outcome.TIE),
        ([-0.700001, -0.7, -5], Outcome.TIE),
        ([-0.7, -5, -0.7], Outcome.TIE),
        ([-0.69, -0.7, -5], Side.FIRST),
        ([-0.7, -0.69, -5], Side.SECOND),
        ([-math.inf, -0.7, -math.inf], Side.SECOND),
    ],
)
def test_label_tokens_equally_likely_sides_make_a_tie(log_probs, outcome):
    fields = LabelTokens(SIDES, [1, 2, 3]).judgment(log_probs)
    assert fields.get("preferred", fields["outcome"]) is outcome


def test_label_tokens_without_probability_are_unparseable(judge):
    judge.engine.likely = [-20.0] * 10
    [result] = ask(judge, "<think>so</think>\n7")
    assert (result.outcome, result.score) == (Outcome.UNPARSEABLE, None)
    assert result.reason.startswith("all labels together") and result.answer
