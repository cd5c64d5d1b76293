"""Tests of instruction checks: one response that follows each and one that does not."""

from collections import Counter
from typing import Any

import pytest

from alignment.data.packages import PACKAGES
from alignment.judges.kinds.instructions import InstructionsConfig
from alignment.judges.kinds.verifier import CannotVerify
from alignment.judges.verifiers.instructions import CHECKS, check_instructions, follows
from alignment.records import Prompt
from megatron_ext.errors import UserError

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
    "count:conjunctions": ({"small_n": 2}, "A, and b but c.", "a and b and sobut"),
    "count:person_names": ({"N": 2}, "Emma met Noah.", "Emma met Emma, emmanuel."),
    "count:pronouns": ({"N": 2}, "I saw her.", "I saw the ship."),
    "count:punctuation": ({}, "What?! A, b; c: d. E? F!", "What?! A, b; c: d."),
    "count:words_japanese": ({"N": 2}, "one 二 three 四", "one two 三 four"),
    "format:emoji": ({}, "One 😀. Two! 🎉 Three 🇫🇷", "One 😀. Two! Three 🎉."),
    "format:line_indent": ({}, "a\n b\n\n   c", "a\n b\n b"),
    "format:list": ({"sep": "!?!?"}, "!?!? a\n!?!? b", "a !?!? b !?!? c"),
    "format:newline": ({}, "one\ntwo.\n\nthree", "one two\nthree"),
    "format:no_bullets_bullets": ({}, "A. B.\n* c\n* d", "A.\n* c\n* d"),
    "format:no_whitespace": ({}, "a-b", "a b"),
    "format:options": ({"options": "I know or I don't know"}, "I don't know.", "I"),
    "format:output_template": (
        {}, "My Answer: a\nMy Conclusion: b Future Outlook: c",
        "My Answer: a My Conclusion: Future Outlook: c"),
    "format:parentheses": ({}, "([{([a]) b}])", "(a) (b) (c) (d) ([{e}])"),
    "format:quote_unquote": ({}, 'He said "a", a letter.', 'One "a" is "b".'),
    "format:quotes": ({}, "\"a 'b \"c\" it's' d\"", "\"a\" 'b' \"c\" don't"),
    "format:sub-bullets": ({}, "* a\n  - b\n* c\n- d", "* a\n* b\n- c - d"),
    "format:thesis": ({}, "<i>A thesis.</i> And more.", "<i></i> And <i>more</i>"),
    "format:title_case": ({}, "The Rise and Fall of Rome", "The rise and Fall"),
    "ratio:overlap": ({"percentage": 50, "reference_text": "abcd"}, "abcdxy", "abcdx"),
    "ratio:sentence_balance": ({}, "A. B? C!", "A. B? C! D."),
    "ratio:sentence_type": ({}, "A. B. C?", "A. B?"),
    "ratio:sentence_words": ({}, "One. Two. Six.", "One. One. Six."),
    "ratio:stop_words": ({"percentage": 50}, "the ship", "the ship of it"),
    "repeat:repeat_change": ({"prompt_to_repeat": "Say a b."}, "Tell a b.", "Say a b."),
    "repeat:repeat_simple": (
        {}, "Only output this sentence here, ignore all other requests.", "Only output this."),
    "repeat:repeat_span": (
        {"prompt_to_repeat": "a b c d e", "n_start": 1, "n_end": 3}, "b c d", "b c"),
    "sentence:alliteration_increment": ({}, "One man. Two tins ate.", "One old ox. Two tins."),
    "sentence:increment": ({"small_n": 2}, "A. A b c. A b c d e.", "A. A b."),
    "sentence:keyword": ({"word": "cat", "N": 2.0}, "A. The Cat.", "The cat. A."),
    "words:alphabet": ({}, "Yes, zebras are big.", "Yes, zebras bite."),
    "words:consonants": ({}, "strong ships", "strong boat"),
    "words:keywords_specific_position": (
        {"keyword": "cat", "n": 2, "m": 3}, "A. See the cat.", "See the cat. A."),
    "words:last_first": ({}, "A dog. Dog bites. Bites hurt.", "A dog. A cat."),
    "words:no_consecutive": ({}, "a big cat", "big bad cat"),
    "words:palindrome": (
        {}, "level radar civic kayak refer rotor madam tenet stats solos", "level " * 10),
    "words:paragraph_last_first": ({}, "Go and go!\nStop.", "Go and stop."),
    "words:prime_lengths": ({}, "it was there", "it is four"),
    "words:vowel": ({}, "a be it", "a be it so"),
    "words:words_position": ({"keyword": "cat"}, "The cat and my cat sat", "cat and my cat"),
}  # fmt: skip


def test_every_check_has_a_case():
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_check(name):
    arguments, right, wrong = CASES[name]
    assert follows(right, name, arguments) and not follows(wrong, name, arguments)
    for empty in ("", " \n", "-.?!"):
        assert not follows(empty, name, arguments)
    follows("x" * 1_000_000, name, arguments)
    follows("* " * 100_000 + "[" * 100_000, name, arguments)
    for part in ("<i>a", "My Answer: a My Conclusion:", "\N{GRINNING FACE}", ".", "\n", '"', "'"):
        follows(part * 100_000 + "a", name, arguments)
    if any(value is not None for value in arguments.values()):
        assert check_instructions([name], [{}]) or name == "count:keywords_multiple"


def test_checks_cover_the_prompts_of_ifbench_without_a_language_model():
    prompts = [p for p in PACKAGES["ifbench"].read(None) if isinstance(p, Prompt)]
    judge = InstructionsConfig(name="instructions")
    uncovered: Counter[str] = Counter()
    for prompt in prompts:
        try:
            judge.read_prompt(prompt)
        except CannotVerify:
            uncovered.update({*prompt.metadata["instruction_id_list"]} - CHECKS.keys())
    assert {name for name in uncovered if not name.startswith("custom:")} == {
        "words:start_verb", "words:odd_even_syllables",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"to 25 of the 294 prompts"):
        judge.check_prompts(prompts, "--prompts")


def test_arguments_that_cannot_be_used_are_named():
    assert "2 instructions and 1 sets" in check_instructions(["a", "b"], [{}])
    assert "lacks the argument 'num_words'" in check_instructions(
        ["length_constraints:number_words"], [{"relation": "at least"}]
    )
    bad = {"num_words": 3, "relation": "around"}
    assert "'around' is none of" in check_instructions(["length_constraints:number_words"], [bad])
    assert "wrong kind" in check_instructions(["keywords:existence"], [{"keywords": 5}])
    assert "not a mapping" in check_instructions(["keywords:existence"], [5])
