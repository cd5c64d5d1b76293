"""Tests of the strict parser of judges' answers."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.judges.formats.parsing import Parser
from alignment.records import Outcome, Side, Verdict

SCORE, THINK = Parser(), Parser(thinks=True)
PAIR = Parser(pairwise=True)


def outcome(parser: Parser, text: str) -> Any:
    """Return the score, the side, TIE, or the reason; every answer makes a valid verdict."""
    fields = parser.read(text)
    verdict = Verdict.from_row({"item": "x", "answer": text, **fields})
    if verdict.outcome is Outcome.TIE:
        return Outcome.TIE
    return verdict.reason or (verdict.score if verdict.preferred is None else verdict.preferred)


def test_parser_accepts_exactly_one_label() -> None:
    for digit in range(10):
        assert outcome(SCORE, f"{digit}") == outcome(SCORE, f" \n\t{digit}\r\n") == float(digit)
    assert outcome(PAIR, "A") is Side.FIRST and outcome(PAIR, " B\n") is Side.SECOND
    assert outcome(PAIR, "tie") is Outcome.TIE
    assert PAIR.read("A", swapped=True)["preferred"] is Side.SECOND
    assert PAIR.read("B", swapped=True)["preferred"] is Side.FIRST
    assert PAIR.read("tie", swapped=True)["outcome"] is Outcome.TIE


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "there is no label"),
        (" \n", "there is no label"),
        ("10", "10 is not a whole number from 0 to 9"),
        ("-1", "-1 is not a whole number"),
        ("+7", "not a whole number"),
        ("7.5", "not a whole number"),
        ("7,5", "not a whole number"),
        ("7/9", "not a whole number"),
        ("07", "not a whole number"),
        ("7 8", "several labels"),
        ("7\n7", "several labels"),
        ("Score: 7", "more than a digit"),
        ("7.", "more than a digit"),
        ("[7]", "more than a digit"),
        ("**7**", "more than a digit"),
        ("seven", "more than a digit"),
        ("٧", "more than a digit"),  # Arabic-Indic
        ("７", "more than a digit"),  # full width
        ("²", "more than a digit"),
        ("7\u00a0", "more than a digit"),
        ("7\x00", "more than a digit"),
        ("<think>fine</think>7", "more than a digit"),
    ],
)
def test_parser_reports_reason_of_unparseable_answer(text: str, reason: str) -> None:
    assert reason in outcome(SCORE, text)


@pytest.mark.parametrize(
    "text", ["a", "AB", "A B", "A or B", "Tie", "C", "[[A]]", "А", "Response A"]
)
def test_parser_requires_exact_pairwise_labels(text: str) -> None:
    assert PAIR.read(text)["outcome"] is Outcome.UNPARSEABLE


def test_parser_returns_thinking_before_label() -> None:
    fields = THINK.read("\n<think>\nIt says 9, but\n4 is due.</think>\n\n4\n")
    assert fields["score"] == 4 and fields["thinking"] == "It says 9, but\n4 is due."
    opened = Parser(thinks=True, opened=True)
    assert opened.read("so so</think>5")["score"] == 5
    assert opened.read("so so</think>5")["thinking"] == "so so"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("7", "does not begin with <think>"),
        ("Well. <think>x</think>7", "does not begin with <think>"),
        ("<think>I give 7", "the thinking does not end"),
        ("<think>7</think>", "there is no label after the thinking"),
        ("<think>x</think>7</think>7", "more than once"),
        ("<think>x</think>7<think>y</think>8", "more than once"),
        ("<think><think>x</think>7", "more than once"),
        ("<think>x</think>7 8", "several labels after the thinking"),
        ("<think>x</think>The score is 7", "more than a digit"),
        ("<think>x</think>12", "12 is not a whole number"),
        ("<THINK>x</THINK>7", "does not begin with <think>"),
    ],
)
def test_parser_refuses_malformed_thinking(text: str, reason: str) -> None:
    assert reason in outcome(THINK, text)
    assert THINK.read(text)["outcome"] is Outcome.UNPARSEABLE


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            ["<think>", "</think>", "7", "3", "10", "-", ".", "A", "B", "tie", "\n", " ", "٣", "5"]
        ),
        st.text(max_size=4),
    ),
    max_size=8,
).map("".join)


@given(pieces)
def test_parser_agrees_with_grammar_of_whole_answer(text: str) -> None:
    space = r"[ \t\r\n]*"
    inside = r"(?:(?!</?think>)[\s\S])*"
    for opened in (False, True):
        begin = "" if opened else f"{space}<think>"
        for pairwise, label in ((False, "[0-9]"), (True, "A|B|tie")):
            alone = re.compile(f"{space}(?P<label>{label}){space}")
            after = re.compile(f"{begin}{inside}</think>{space}(?P<label>{label}){space}")
            for thinks, grammar in ((False, alone), (True, after)):
                parsed = outcome(Parser(pairwise, thinks, opened), text)
                result = grammar.fullmatch(text)
                if result is None:
                    assert (
                        isinstance(parsed, str)
                        and parsed not in list(Side)
                        and parsed != Outcome.TIE
                    )
                else:
                    sides = {"A": Side.FIRST, "B": Side.SECOND, "tie": Outcome.TIE}
                    assert parsed == (
                        sides[result["label"]] if pairwise else float(result["label"])
                    )


def test_parser_identity_depends_on_settings() -> None:
    identities = {
        Parser(pairwise, thinks, opened).identity
        for pairwise in (False, True) for thinks in (False, True) for opened in (False, True)
    }  # fmt: skip
    assert len(identities) == 8 and Parser().identity == Parser().identity
