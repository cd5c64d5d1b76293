"""Where a judge that thinks has its label, and what is made of one that is not there."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignment.engines.protocol import Generated
from alignment.judges import local
from alignment.judges.local import JudgeForm, LocalJudge
from alignment.judges.parsing import Parser
from alignment.judges.prompting import judge_prompt
from alignment.judges.questions import Question
from alignment.records import Message, Outcome, Prompt, Response
from tests.alignment.chat_model import make_tokenizer

LIKELY = [math.log(p) for p in (0.0001, 0.0001, 0.0001, 0.2, *[0.0001] * 3, 0.6, 0.0001, 0.0001)]


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Its answers are `said`, its labels have the log-probabilities `likely`."""
    monkeypatch.setattr(local, "most_of_ranks", lambda count: count)
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([" 7"])
    engine: Any = SimpleNamespace(said=[], likely=LIKELY, after=[])

    def generate(prompts, *_):
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in engine.said]
        return [Generated([*row, tokenizer.eos_token_id], [], True) for row in ids]

    def next_log_probs(batch, labels):
        engine.after = [
            tokenizer.decode(row[: int(mine.sum())])
            for row, mine in zip(batch.tokens, batch.samples >= 0)
        ]
        return torch.tensor(engine.likely).expand(*batch.tokens.shape, len(labels))

    engine.generate, engine.next_log_probs = generate, next_log_probs
    form = JudgeForm(judge_prompt("pointwise", True), Parser(thinks=True), tokenizer)
    return LocalJudge(engine, form, 10_000)


def ask(judge, *said):
    judge.engine.said = said
    prompt = Prompt("p", (Message("user", "say"),))
    return judge.judge([Question(Response(str(n), prompt, f"good {n}")) for n in range(len(said))])


def test_the_score_is_read_after_the_thinking_or_not_at_all(judge):
    found = ask(judge, "<think>3 of 4</think>\n7", "<think>3 of 4</think> 7")
    assert found[0].score == pytest.approx((3 * 0.2 + 7 * 0.6) / 0.8, abs=0.01)
    assert [text.endswith("3 of 4</think>\n") for text in judge.engine.after] == [True]
    assert found[1].outcome is Outcome.UNPARSEABLE and found[1].score is None
    assert "other tokens" in found[1].reason and found[1].answer.endswith("</think> 7")


def test_a_label_without_probability_is_no_score(judge):
    judge.engine.likely = [-20.0] * 10
    [found] = ask(judge, "<think>so</think>\n7")
    assert (found.outcome, found.score) == (Outcome.UNPARSEABLE, None)
    assert found.reason.startswith("all labels together") and found.answer
