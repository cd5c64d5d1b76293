"""Tests of the checks of IFBench's constraints: scores by hand, and every packaged prompt."""

import pytest

from alignment.data.packages import PACKAGES
from alignment.records import Message, Prompt, Response
from examples.alignment.checks import CHECKS, constraints_of, form, score, words_of


def level(name, text, **arguments):
    return CHECKS[name](text, words_of(text), {key: str(value) for key, value in arguments.items()})


@pytest.mark.parametrize(
    ("name", "text", "arguments", "expected"),
    [
        ("count:conjunctions", "red and blue, but not green", {"small_n": 4}, 2 / 4),
        ("count:numbers", "2 cows and 30 birds", {"N": 2.0}, 1),
        ("count:numbers", "2 cows", {"N": 4.0}, 1 / 4),
        ("count:pronouns", "I saw you and them", {"N": 6.0}, 3 / 6),
        ("count:unique_word_count", "a b a b c", {"N": 6.0}, 3 / 6),
        ("count:word_count_range", "one two three", {"min_words": 3.0, "max_words": 5.0}, 1),
        ("count:word_count_range", "one", {"min_words": 3.0, "max_words": 4.0}, 1 / 2),
        ("count:punctuation", "a.b,c", {}, 2 / 11),
        ("count:keywords_multiple", "a nebula", {"keyword1": "nebula", "keyword2": "x"}, 1 / 2),
        ("format:emoji", "Hello 😀 Bye.", {}, 0),
        ("format:emoji", "Hello! 😀 Bye.", {}, 1 / 2),
        ("format:emoji", "Hello there! 😀 How are you? 👩‍💻✌️", {}, 1),
        ("format:emoji", "Hello there... 😀 😀\nHow are you 😀? Bye. 😀 Now", {}, 3 / 4),
        ("format:list", "!?one\ntwo", {"sep": "!?"}, 1 / 2),
        ("format:newline", "one\ntwo three", {}, 1 / 2),
        ("format:no_whitespace", "abcdef", {}, 1),
        ("format:options", "Maybe.", {"options": "yes/no/maybe"}, 1),
        ("format:options", "I don't know.", {"options": "I know or I don't know"}, 1),
        ("format:options", "C", {"options": "a), b), c), d)"}, 1),
        ("format:options", "e)", {"options": "a), b), c), d)"}, 0),
        ("format:parentheses", "(a [b {c}])", {}, 3 / 5),
        ("format:title_case", "All Of this", {}, 2 / 3),
        ("ratio:sentence_type", "A b. C d. E f?", {}, 1),
        ("ratio:sentence_type", "A b. 😀 C d. 😀 E f? 😀", {}, 1),
        ("ratio:stop_words", "the cow of a bird", {"percentage": 60.0}, 1),
        ("words:alphabet", "all bees can dance well", {}, 3 / 4),
        ("words:consonants", "stone oar", {}, 1 / 2),
        ("words:no_consecutive", "big bad cow", {}, 1 / 2),
        ("words:prime_lengths", "two cows", {}, 1 / 2),
        ("words:repeats", "a a a b", {"small_n": 2.0}, 1 / 2),
        ("words:vowel", "a big red cow", {}, 1 / 2),
    ],
)
def test_constraint_levels_of_each_kind(name, text, arguments, expected):
    assert level(name, text, **arguments) == pytest.approx(expected)


def test_keyword_constraint_counts_as_often_as_the_prompts_say():
    words = ("Cow", "dog", "hen", "pig", "ram")
    keywords = {f"keyword{n}": word for n, word in enumerate(words, 1)}
    text = "cow " + "dog " * 2 + "hen " * 3 + "pig " * 5 + "ram " * 7
    assert level("count:keywords_multiple", text, **keywords) == 1
    assert level("count:keywords_multiple", "cow dog hen pig ram", **keywords) == pytest.approx(
        (1 + 1 / 2 + 1 / 3 + 1 / 5 + 1 / 7) / 5
    )
    assert level("count:keywords_multiple", text + "cow ram", **keywords) == pytest.approx(
        (0 + 1 + 1 + 1 + 6 / 7) / 5
    )


def test_form_level_of_a_response():
    assert form("It is a cow.") == 1 == form("It is a cow! 😀 ✌️")
    assert form("It is a cow 😀") == 1 / 2
    assert form("a b c a b c a b c a b c") == 0


def test_option_constraint_reads_each_option_of_ifbench():
    options = {"yes/no/maybe": 3, "I know or I don't know": 2, "a), b), c), d)": 4}
    checks = [
        arguments["options"]
        for prompt in PACKAGES["ifbench"].read(None)
        if isinstance(prompt, Prompt)
        for name, arguments in constraints_of(prompt.rubric)
        if name == "format:options"
    ]
    assert set(checks) == set(options)
    for text, count in options.items():
        hits = [x for x in ("Yes", "No.", "MAYBE", "I know", "I don't know", "a)", "b", "C)", "d).")
                if level("format:options", x, options=text)]  # fmt: skip
        assert len(hits) == count


def test_constraints_of_every_ifbench_prompt_are_read():
    prompts = [p for p in PACKAGES["ifbench"].read(None) if isinstance(p, Prompt)]
    usable = [prompt for prompt in prompts if constraints_of(prompt.rubric)]
    assert len(prompts) == 294 and len(usable) == 150
    for prompt in usable:
        for text in ("", "Hello there.", "One two 3, (four) five!\nSix? " * 9):
            assert 0 <= score(Response("r", prompt, text)) <= 9


def test_score_of_a_prompt_without_constraints_is_its_form():
    prompt = Prompt("p", (Message("user", "say"),))
    assert score(Response("r", prompt, "It is a cow.")) == 9
    assert score(Response("r", prompt, "")) == 0
    rubric = "It meets every one of these constraints:\n- format:newline"
    checked = Prompt("p", (Message("user", "say"),), rubric=rubric)
    assert score(Response("r", checked, "It is a cow.")) == 3
