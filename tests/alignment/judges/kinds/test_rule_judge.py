"""Tests of the rule that serves as gold judge: its preferences, thinking and bias."""

import random
import re
from typing import Any

import pytest

from alignment.judges.formats.parsing import Parser
from alignment.judges.kinds.rule_judge import (
    GOLD,
    NUMBERS,
    RULES,
    Fluency,
    RuleJudge,
    round_half_up,
)  # fmt: skip
from alignment.records import Message, Outcome, Pair, Prompt, Response
from megatron_ext.errors import UserError
from tests.distributed import ROOT

PROMPT = Prompt("p", [Message("user", "Which experts take tokens above their threshold?")])


@pytest.fixture(scope="module")
def fluency() -> Fluency:
    pages = sorted(ROOT.glob("docs/*/*.md"))
    return Fluency.fit(line for page in pages for line in page.read_text().splitlines())


def test_rule_score_follows_from_its_thinking(fluency: Fluency) -> None:
    judge, draw = RuleJudge(GOLD, fluency), random.Random(0)
    words = (ROOT / "docs/how-to/serving.md").read_text().split()
    scores = set()
    for number in range(80):
        at = draw.randrange(len(words) - 60)
        text = words[at : at + draw.randrange(60)]
        if number % 3 == 0:
            draw.shuffle(text)
        prompt = Prompt("p", [Message("user", " ".join(draw.sample(words[at : at + 60], 6)))])
        verdict = judge.verdict(Response("r", prompt, " ".join(text) + draw.choice([".", ""])))
        levels = {
            name: NUMBERS.index(word)
            for name, word in re.findall(r"([a-z ]+?) ([a-z]+)[,.] ?", verdict.thinking)
        }
        assert set(levels) == set(GOLD.weights)
        read = Parser(thinks=True).read(verdict.answer)
        assert read == {"outcome": "score", "score": verdict.score, "thinking": verdict.thinking}
        mean = sum(GOLD.weights[n] * level for n, level in levels.items()) / 12
        assert verdict.score == round_half_up(mean)
        scores.add(verdict.score)
    assert len(scores) >= 5


def test_rule_features_measure_what_they_are_named_for(fluency: Fluency) -> None:
    judge = RuleJudge(GOLD, fluency)

    def levels(text: str) -> dict[str, int]:
        return judge.levels(PROMPT.messages, text)

    good = (
        "Tokens go to experts whose threshold is below the score, and the run tells how many of "
        "the tokens there are above it in each of the layers."
    )
    assert levels(good)["topic"] == round_half_up(9 * 4 / 5)  # all but "take"
    assert levels(good)["ending"] == 9 and levels(good[:-1])["ending"] == 0
    assert levels(good)["length"] == 9 and levels("Above.")["length"] == 1
    assert levels("an expert and " * 8)["variety"] == 0 and levels(good)["variety"] == 9
    words = good.split()
    shuffled = [" ".join(random.Random(seed).sample(words, len(words))) for seed in range(20)]
    fluency_of_shuffled = [levels(text)["fluency"] for text in shuffled]
    assert sum(level < levels(good)["fluency"] for level in fluency_of_shuffled) >= 18
    assert levels("")["topic"] == levels("")["fluency"] == levels("")["length"] == 0


def test_no_copying_rule_ignores_copied_content_words(
    fluency: Fluency,
) -> None:
    second = RULES["no-copying"]
    assert set(GOLD.weights) ^ set(second.weights) == {"topic", "own topic"}
    judges = [RuleJudge(rule, fluency) for rule in (GOLD, second)]
    copied = Response("r", PROMPT, PROMPT.messages[0].content)
    first_score, second_score = (judge.verdict(copied).score for judge in judges)
    assert first_score is not None and second_score is not None
    assert second_score == first_score - 3  # weight 4 of 12
    assert judges[0].identity != judges[1].identity


def test_rule_compares_pairs_equally_in_both_orders(
    fluency: Fluency,
) -> None:
    judge = RuleJudge(GOLD, fluency)
    texts = ["Experts take tokens above a threshold.", "Experts take tokens", "", "no no no no"]
    outcomes = set()
    for a in texts:
        for b in texts:
            pair = Pair("x", PROMPT, a, b)
            forward, swapped = judge.verdict(pair), judge.verdict(pair, swapped=True)
            assert (forward.outcome, forward.preferred) == (swapped.outcome, swapped.preferred)
            outcomes.add(forward.outcome)
            for verdict in (forward, swapped):
                read = Parser(pairwise=True, thinks=True).read(verdict.answer, verdict.swapped)
                assert (
                    read["outcome"] == verdict.outcome
                    and read.get("preferred") == verdict.preferred
                )
            if a == b:
                assert forward.outcome is Outcome.TIE
    assert outcomes == {Outcome.TIE, Outcome.PREFERENCE}


@pytest.mark.parametrize("texts", [["one two three"], ["x " * 50] * 20])
def test_fluency_refuses_uninformative_reference(texts: Any) -> None:
    with pytest.raises(UserError, match="--rule-text"):
        Fluency.fit(texts)
