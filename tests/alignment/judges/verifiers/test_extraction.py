"""Tests of the extraction of answers, where the first rule that applies decides."""

import pytest

from alignment.judges.verifiers.extraction import extract_answer, final_text


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so $\boxed{42}$.", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{42} and an open \boxed{", "42"),
        ("work\n#### 42", "42"),
        ("work\n#### 42\n\n", "42"),
        ("#### Step 2: add\nso 42", None),  # a heading of Markdown
        ("##### 42", None),
        ("The answer is 42.", "42"),
        ("The answer is **42**, because 6 * 7 = 42.", "42"),
        ("**Answer:** 1,234 apples", "1,234 apples"),
        ("Final answer: 3.5 cm. Check: 7 / 2 = 3.5.", "3.5 cm"),
        ("The answer is 1. No: the answer is 2!", "2"),
        (r"The answer is 1, \boxed{2}" + "\n#### 3", "2"),
        ("an answer", None),
        ("answer:", None),
        ("", None),
        (r"\boxed{}", ""),
        (r"Answer: \(42\)", "42"),
        (r"The answer is **\( x + 1 \)**.", "x + 1"),
        ("The answer is \\[ 42 \\].", "42"),
        (r"The answer is \(x\) or \(y\).", r"\(x\) or \(y\)"),
        (r"The answer is f\(x\).", r"f\(x\)"),
    ],
)
def test_auto_takes_the_first_rule_that_applies(text, expected):
    assert extract_answer(text) == expected


def test_other_places():
    text = "The answer is 1.\n#### 2\n\n_three_\n"
    assert extract_answer(text, "last-line") == "three"
    assert extract_answer(" a\nb ", "whole") == "a\nb"
    assert extract_answer(text, "boxed") is None and extract_answer(text, "hashes") is None
    assert extract_answer(text, "phrase") == "1"


def test_thinking_is_left_out_and_must_end():
    assert final_text("<think>42</think> 43") == " 43"
    assert final_text("42</think>43") == "43"  # opened by the chat template
    assert final_text("<think>42") is None
    assert final_text("42") == "42"


def test_an_endless_text_is_searched_in_linear_time():
    assert extract_answer(r"\boxed{" * 20_000) is None
    assert extract_answer("answer is " * 100_000) is not None
    assert extract_answer(r"\(" * 100_000 + "1", "last-line") is not None
