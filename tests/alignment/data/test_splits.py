"""Tests of splits by prompt, and of near-duplicates."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.near_duplicates import HASHES, SHINGLE, Signatures, signature, words
from alignment.data.splits import Split, Splitter
from alignment.records import Message, Prompt
from megatron_ext.errors import UserError

VOCABULARY = [f"w{n}" for n in range(300)]


def jaccard(a: list[str], b: list[str]) -> float:
    sets = [
        {tuple(t[i : i + SHINGLE]) for i in range(max(1, len(t) - SHINGLE + 1))} for t in (a, b)
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(text: list[str], count: int, rng: random.Random) -> list[str]:
    text = list(text)
    for place in rng.sample(range(len(text)), count):
        text[place] = rng.choice(VOCABULARY)
    return text


def test_signatures_estimate_the_similarity() -> None:
    rng = random.Random(1)
    errors = []
    for count in range(40):
        text = rng.choices(VOCABULARY, k=120)
        other = changed(text, count, rng)
        estimate = (signature(text) == signature(other)).mean()
        errors.append(estimate - jaccard(text, other))
    # The standard error of one is below 0.5 / sqrt(HASHES).
    assert abs(np.mean(errors)) < 3 * 0.5 / np.sqrt(HASHES * len(errors))
    assert np.std(errors) < 1.5 * 0.5 / np.sqrt(HASHES)


def test_near_texts_are_those_that_a_comparison_of_all_finds() -> None:
    rng = random.Random(2)
    bases = [rng.choices(VOCABULARY, k=60) for _ in range(60)]
    texts = [changed(base, rng.randrange(12), rng) for base in bases for _ in range(6)]
    signatures = Signatures()
    for text in [*bases, *texts]:
        signatures.add(text)
    others, own = np.arange(len(bases)), np.arange(len(bases), len(bases) + len(texts))
    near_ones = signatures.near(own, others, 0.7)
    likeliest = [max(jaccard(text, base) for base in bases) for text in texts]
    for near, similarity in zip(near_ones, likeliest):
        if abs(similarity - 0.7) > 0.15:  # more than three standard errors
            assert near == (similarity > 0.7)
    assert 50 < near_ones.sum() < len(texts) - 50
    assert not signatures.near(own, others[:0], 0.7).any()


def test_many_equal_texts_are_compared_in_bounded_blocks() -> None:
    signatures = Signatures()
    for _ in range(600):
        signatures.add(["the", "same", "words"])
    signatures.add(["other", "words", "here"])
    near = signatures.near(np.arange(300, 601), np.arange(300), 0.9)
    assert near[:300].all() and not near[300]


def test_words_leave_out_what_does_not_matter() -> None:
    assert words("Write — a POEM,\n please!") == words("write a poem please")
    assert words("写一首诗") == list("写一首诗")
    assert words("ｆｕｌｌ width") == ["full", "width"]
    assert words(" ?! ") == ["?!"] and words("") == [""]


def prompt(text: str) -> Prompt:
    return Prompt(text[:20] or "-", [Message("system", "Always the same."), Message("user", text)])


def split_all(splitter: Splitter, texts: list[str]) -> list[str | None]:
    for text in texts:
        splitter.add(prompt(text))
    splitter.assign()
    return [splitter.split_of(prompt(text)) for text in texts]


SPLITS = [Split("test", 3), Split("policy", 0.3), Split("train", "rest")]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10_000), min_size=12, max_size=40, unique=True), st.randoms())
def test_splits_depend_on_the_prompts_and_not_on_their_order(
    numbers: list[int], rng: random.Random
) -> None:
    texts = [" ".join(random.Random(n).choices(VOCABULARY, k=9)) for n in numbers]
    splitter = Splitter(SPLITS)
    splits = dict(zip(texts, split_all(splitter, [*texts, *texts[:5]])))
    assert splitter.sizes["test"] == 3
    assert sum(splitter.sizes.values()) + sum(splitter.near.values()) == len(texts)
    for name, size in splitter.sizes.items():
        assert list(splits.values()).count(name) == size
    shuffled = rng.sample(texts, len(texts))
    assert dict(zip(shuffled, split_all(Splitter(SPLITS), shuffled))) == splits


def test_no_prompt_of_a_later_split_is_near_to_one_of_an_earlier_split() -> None:
    rng = random.Random(3)
    bases = [rng.choices(VOCABULARY, k=40) for _ in range(30)]
    texts = [base if copy == 0 else changed(base, 1, rng) for base in bases for copy in range(5)]
    splits = [Split("test", 20), Split("policy", 0.4), Split("train", "rest")]
    splitter = Splitter(splits)
    names = split_all(splitter, [" ".join(text) for text in texts])
    assert splitter.sizes["test"] == 20 and splitter.near["test"] == 0
    assert splitter.near["policy"] > 0 and splitter.near["train"] > 0
    placed = [(name, text) for name, text in zip(names, texts) if name]
    for name, text in placed:
        for other, near in placed:
            if name != other:
                assert jaccard(text, near) < 0.8
    # A prompt is left out only if an earlier split contains a near one.
    earlier = [text for name, text in placed if name != "train"]
    for text in [text for name, text in zip(names, texts) if name is None]:
        assert max(jaccard(text, near) for near in earlier) > 0.6


def test_other_seed_produces_other_splits() -> None:
    texts = [f"{n} {n * 7} {n * 11}" for n in range(100)]
    halves = [Split("a", 0.5), Split("b", "rest")]
    one, two = (split_all(Splitter(halves, seed), texts) for seed in (0, -1))
    assert 25 < sum(a != b for a, b in zip(one, two)) < 75


@pytest.mark.parametrize(
    "text", ["a", "a=", "=1", "a=0", "a=1.0", "a=-1", "a=x", "a=nan", "../a=1", "a=1.5", "a=0.0"]
)
def test_split_refuses_text_of_another_form(text: str) -> None:
    with pytest.raises(UserError, match="Give NAME=1000"):
        Split.parse(text)


def test_splitter_refuses_impossible_splits() -> None:
    assert Split.parse("a-b=0.25") == Split("a-b", 0.25) and Split.parse("a=7").size == 7
    with pytest.raises(UserError, match="names a twice"):
        Splitter([Split("a", 1), Split("a", 1)])
    with pytest.raises(UserError, match="Only the last"):
        Splitter([Split("a", "rest"), Split("b", 1)])
    with pytest.raises(UserError, match="requires 3 prompts, and there are 2"):
        split_all(Splitter([Split("a", 3)]), ["one", "two"])
    with pytest.raises(UserError, match=r"a=0\.01 leaves no prompt"):
        split_all(Splitter([Split("a", 0.01), Split("b", "rest")]), ["one", "two"])
