"""Checks of instructions: one response that follows each and one that does not."""

from typing import Any

import pytest

from alignment.judges.verifiers.instructions import CHECKS, check_instructions, follows

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["cat", "dog"]}, "A Cat and a dog.", "A cat and dogs."),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "A category.", "A CAT."),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "less than"},
        "cat", "cat, cat"),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
        "Aa", "ab"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "a b c", "a, b!"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"}, "One. ", "One! Two?"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "cat"},
        "a\n\nCat b", "a\n\nthe cat"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a] b"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "a\nP. S. b", "a PS"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "no"),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, "*a* **b**", "*a* * *"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2}, "PART 1 a PART 2 b", "PART a PART b"),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A>>\nb", "<< >>"),
    "combination:two_responses": ({}, "a\n******\nb", "a\n******\na"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say a."}, "say A. b", "b say a."),
    "startend:end_checker": ({"end_phrase": "The end."}, "a. the end.", "the end. a"),
    "startend:quotation": ({}, '"a"', '"'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 1, "capital_relation": "at least"}, "an ABC", "Abc"),
    "change_case:english_capital": ({}, "ABC 1!", "ABc"),
    "change_case:english_lowercase": ({}, "abc 1!", "Abc"),
    "punctuation:no_comma": ({}, "a; b", "a, b"),
    "count:word_count_range": ({"min_words": 2, "max_words": 3}, "a b", "a b c d"),
    "count:unique_word_count": ({"N": 2}, "a b", "a A"),
    "count:keywords_multiple": (
        {"keyword1": "x", "keyword2": "y", "keyword3": None}, "x y y", "x y"),
    "count:numbers": ({"N": 2}, "1 and 23", "123"),
    "words:repeats": ({"small_n": 1}, "a b", "a b A"),
}  # fmt: skip


def test_every_check_has_a_case():
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_check(name):
    arguments, right, wrong = CASES[name]
    assert follows(right, name, arguments) and not follows(wrong, name, arguments)
    for empty in ("", " \n"):
        assert not follows(empty, name, arguments)
    follows("x" * 1_000_000, name, arguments)
    follows("* " * 100_000 + "[" * 100_000, name, arguments)
    if any(value is not None for value in arguments.values()):
        assert check_instructions([name], [{}]) or name == "count:keywords_multiple"


def test_arguments_that_cannot_be_used_are_named():
    assert "2 instructions and 1 sets" in check_instructions(["a", "b"], [{}])
    assert "lacks the argument 'num_words'" in check_instructions(
        ["length_constraints:number_words"], [{"relation": "at least"}]
    )
    bad = {"num_words": 3, "relation": "around"}
    assert "'around' is none of" in check_instructions(["length_constraints:number_words"], [bad])
    assert "wrong kind" in check_instructions(["keywords:existence"], [{"keywords": 5}])
    assert "not a mapping" in check_instructions(["keywords:existence"], [5])
