import json
import math
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.evaluation.ngram_losses import Bigram, Unigram, baseline_losses
from tests.distributed import ROOT
from tests.tools.preprocessed import make_texts, preprocess, write_jsonl
from tests.warm import warm_python
from tools.ngram_baseline import main

VOCABULARY = 5
STREAMS = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=200)


def brute_force_bigram(train: list[int], context: int, token: int) -> float:
    """Return interpolated modified Kneser-Ney from its definition, one pair at a time."""
    counts = Counter(pairwise(train))
    times = Counter(counts.values())
    discount = {1: 0.5, 2: 0.5, 3: 0.5}
    if all(times[m] for m in (1, 2, 3, 4)):
        y = times[1] / (times[1] + 2 * times[2])
        discount = {
            m: min(max(m - (m + 1) * y * times[m + 1] / times[m], 0.1), m) for m in (1, 2, 3)
        }
    ending = Counter(b for _, b in counts)
    continuation = (ending[token] + 1) / (len(counts) + VOCABULARY)
    after = {b: n for (a, b), n in counts.items() if a == context}
    if not after:
        return continuation
    total = sum(after.values())
    freed = sum(discount[min(n, 3)] for n in after.values())
    count = after.get(token, 0)
    retained = count - discount[min(count, 3)] if count else 0.0
    return retained / total + freed / total * continuation


@given(STREAMS)
def test_bigram_equals_its_definition_and_sums_to_one(train: list[int]) -> None:
    model = Bigram.fit(np.array(train), VOCABULARY)
    tokens = np.arange(VOCABULARY)
    for context in range(VOCABULARY):
        actual = model.probability(np.full(VOCABULARY, context), tokens)
        required = [brute_force_bigram(train, context, token) for token in range(VOCABULARY)]
        assert actual == pytest.approx(required, abs=1e-12)
        assert actual.sum() == pytest.approx(1.0)
        assert (actual > 0).all()


def test_discounts_are_estimated_from_sufficient_text() -> None:
    generator = np.random.default_rng(1)
    train = generator.choice(VOCABULARY, 80, p=[0.5, 0.2, 0.15, 0.1, 0.05]).tolist()
    assert {1, 2, 3, 4} <= set(Counter(pairwise(train)).values())
    model = Bigram.fit(np.array(train), VOCABULARY)
    assert len({round(float(d), 6) % 1 for d in model.discounted}) > 1  # not one discount for all
    for context in range(VOCABULARY):
        for token in range(VOCABULARY):
            [actual] = model.probability(np.array([context]), np.array([token]))
            assert actual == pytest.approx(brute_force_bigram(train, context, token), abs=1e-12)


@given(STREAMS)
def test_unigram_sums_to_one_and_follows_counts(train: list[int]) -> None:
    model = Unigram.fit(np.array(train), VOCABULARY)
    assert model.probabilities.sum() == pytest.approx(1.0)
    counts = Counter(train)
    expected = [(counts[t] + 1) / (len(train) + VOCABULARY) for t in range(VOCABULARY)]
    assert model.probabilities == pytest.approx(expected)


@given(STREAMS, STREAMS)
def test_losses_exclude_the_first_token(train: list[int], valid: list[int]) -> None:
    losses = baseline_losses(np.array(train), np.array(valid), VOCABULARY)
    bigram = [-math.log(brute_force_bigram(train, a, b)) for a, b in pairwise(valid)]
    assert losses["bigram"] == pytest.approx(sum(bigram) / len(bigram))
    counts = Counter(train)
    unigram = [-math.log((counts[b] + 1) / (len(train) + VOCABULARY)) for b in valid[1:]]
    assert losses["unigram"] == pytest.approx(sum(unigram) / len(unigram))


def test_bigram_learns_what_a_unigram_cannot() -> None:
    alternating = np.array([0, 1] * 200)
    losses = baseline_losses(alternating, alternating, VOCABULARY)
    assert losses["bigram"] < 0.1
    assert losses["unigram"] == pytest.approx(math.log(2), abs=0.05)


def test_datasets_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, tokenizer in (
        ("train", {"sha256": "1", "vocab_size": 9}),
        ("valid", {"sha256": "2"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokenizer": tokenizer}))
    train, valid = (str(tmp_path / name) for name in ("train", "valid"))
    words = ["--train-data", train, "--vocab-size", "8", "--valid-data"]
    with pytest.raises(UserError, match="were made with different tokenizers"):
        main([*words, valid])
    with pytest.raises(UserError, match=r"which has 9 entries\. Set it to 9"):
        main([*words, train])
    (tmp_path / "train.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest.*Give --vocab-size"):
        main(["--train-data", train, "--valid-data", valid])


def test_vocabulary_size_is_that_of_the_manifest(tmp_path: Path, model: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(60))
    preprocess(model, [source], tmp_path / "data", "--valid-fraction", 0.3)
    data = [f"{tmp_path}/data_{split}_text_document" for split in ("train", "valid")]
    words = ["-m", "tools.ngram_baseline", "--train-data", data[0], "--valid-data", data[1]]
    first, same = (
        subprocess.run(
            [warm_python(), *words, *more], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for more in ([], ["--vocab-size", "360"])
    )
    assert json.loads(first.stdout) == json.loads(same.stdout)
    assert first.stderr == ""
