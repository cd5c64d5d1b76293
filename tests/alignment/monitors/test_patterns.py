"""Tests of the file of patterns: the permitted syntax, which keeps matching fast for any text."""

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.monitors.detectors import DETECTORS, NAMES, detect
from alignment.monitors.patterns import ENGLISH
from alignment.monitors.text_features import fold
from alignment.records import Message

LINES = [
    (name, line)
    for name, section in ENGLISH.sections.items()
    if not name.startswith("word ") and not name.endswith(" whole")
    for line in section
]
_MOST_WAYS = 100_000


def ways(items: Any) -> int:
    """Return in how many lengths of its repeats a pattern can be tried from one place, at most."""
    total = 1
    for code, argument in items:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, repeated = argument
            assert most is not codes.MAXREPEAT, "an unbounded repeat"
            inside = ways(repeated)
            total *= sum(inside**count for count in range(least, most + 1))
        elif code is codes.POSSESSIVE_REPEAT:
            assert argument[1] is not codes.MAXREPEAT, "an unbounded repeat"
            total *= ways(argument[2])
        elif code is codes.SUBPATTERN:
            total *= ways(argument[3])
        elif code is codes.BRANCH:
            total *= max(ways(branch) for branch in argument[1])
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            total *= ways(argument[1])
    return total


@pytest.mark.parametrize("name, line", LINES)
def test_from_each_place_a_pattern_is_tried_in_a_bounded_number_of_ways(
    name: str, line: str
) -> None:
    assert ways(parser.parse(ENGLISH.expand(line))) <= _MOST_WAYS


def test_bound_identifies_patterns_of_exponential_time() -> None:
    with pytest.raises(AssertionError, match="unbounded"):
        ways(parser.parse(r"(?:a+)+b"))
    assert ways(parser.parse(r"(?:\w{1,30} ?){1,30}b")) > _MOST_WAYS
    assert ways(parser.parse(r"a{0,9}b{2}(?:cd|e{1,3})")) == 10 * 1 * 3


@pytest.mark.parametrize("name, line", LINES)
def test_a_line_uses_the_signs_and_nothing_that_folded_text_does_not_have(
    name: str, line: str
) -> None:
    expanded = ENGLISH.expand(line)
    re.compile(expanded)
    assert "@" not in expanded and " " not in re.sub(r"\[[^\]]*\]", "", expanded)
    assert not set(line) & set("“”‘’")
    plain = line.replace("\\A", "").replace("\\W", "").replace("\\Z", "")
    assert plain == plain.lower()


@pytest.mark.parametrize("line", [line for lines in ENGLISH.sections.values() for line in lines])
def test_no_line_has_an_unbounded_repeat(line: str) -> None:
    ways(parser.parse(ENGLISH.expand(line)))


def test_sections_name_detectors() -> None:
    for name in ENGLISH.sections:
        first, _, kind = name.partition(" ")
        assert kind in ("", "requested", "anywhere", "whole") or first == "word", name
        assert first == "word" or first in NAMES, name
    assert set(ENGLISH.fires) < set(DETECTORS)


@pytest.mark.parametrize(
    "unit",
    [
        "policy 1 request ", "i cannot ", '"a ', "``` ", "[grader ", "\nuser: x\n", "ab", "\n",
        '"word" . ', "a. ", "<a ", "</response> ", "i g n o r e ", "1a", "你", "。", "| a | b |\n",
        "<|a", "\u0301", "set aside ",
    ],
)  # fmt: skip
def test_long_text_of_near_matches_is_searched(unit: str) -> None:
    # If the time were quadratic, the time limit of tests would end this.
    text = (unit * 100_000)[:100_000]
    for evidence in detect([Message("user", "Go on.")], text).values():
        assert all(piece in text for piece in evidence)


@given(st.text())
def test_folded_text_has_the_same_length(text: str) -> None:
    assert len(fold(text)) == len(text)


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_fast_path_for_ascii_returns_equal_text(text: str) -> None:
    assert fold(text) == fold("é" + text)[1:]
