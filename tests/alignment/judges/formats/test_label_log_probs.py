"""Tests of log-probabilities of labels as servers return them, and of expectations under them."""

import itertools
import math
import random
from typing import Any

import pytest

from alignment.judges.formats.label_log_probs import expected_score, read_label_log_probs


def position(token: str, top: Any, logprob: Any = -0.1, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "top_logprobs": top, **more}


def top(**likely: float) -> list[dict[str, Any]]:
    return [{"token": name.strip("_"), "logprob": math.log(p)} for name, p in likely.items()]


def expected(*positions: Any, label: int = 7) -> float:
    return expected_score(read_label_log_probs({"content": list(positions)}), label)


def test_expected_score_renormalizes_over_labels():
    likely = top(_7=0.5, _8=0.3, the=0.2)
    assert expected(position("7", likely)) == pytest.approx((7 * 0.5 + 8 * 0.3) / 0.8)


@pytest.mark.parametrize("token", ["7", " 7", "7\n", "\n7", "▁7", "Ġ7", "7Ċ"])
def test_label_log_probs_ignore_space_around_a_label(token):
    assert expected(position(token, [{"token": token, "logprob": -0.1}])) == 7.0


@pytest.mark.parametrize("token", ["７", "٧", "7.", "77", "07", "seven", ""])
def test_label_log_probs_skip_other_tokens(token):
    with pytest.raises(LookupError, match="no token of the answer is the label alone"):
        expected(position(token, [{"token": token, "logprob": -0.1}]))


def test_label_log_probs_read_bytes_of_tokens():
    listed = [
        {"token": "<0x37>", "logprob": math.log(0.6), "bytes": [55]},
        {"token": "token_id:24", "logprob": math.log(0.3), "bytes": [32, 57]},
    ]
    assert expected(position("<0x37>", listed, bytes=[55])) == pytest.approx((4.2 + 2.7) / 0.9)


def test_label_log_probs_count_repeated_tokens_once():
    repeated = [("7", -0.5), ("7", -0.7), (" 7", -2.0), ("8", -1.5), ("8", -1.5), ("x", -3.0)]
    seven, eight = math.exp(-0.5) + math.exp(-2.0), math.exp(-1.5)
    right = (7 * seven + 8 * eight) / (seven + eight)
    result = set()
    for order in itertools.islice(itertools.permutations(repeated), 0, 720, 7):
        listed = [{"token": token, "logprob": value} for token, value in order]
        # The sampled token's own value, of another pass of the server, does not count.
        result.add(expected(position("7", listed, logprob=random.uniform(-3, 0))))
    assert len(result) == 1 and result.pop() == pytest.approx(right, rel=1e-12)


def test_label_log_probs_include_unlisted_sampled_label():
    listed = [{"token": "8", "logprob": math.log(0.6)}]
    assert expected(position("7", listed, logprob=math.log(0.2))) == pytest.approx(6.2 / 0.8)


@pytest.mark.parametrize(
    "likely", [top(_7=0.3), top(_7=0.2, the=0.1), top(_7=0.004, the=0.99), top(_7=0.4, _8=0.05)]
)
def test_expected_score_refuses_labels_outweighed_by_unlisted_tokens(likely):
    with pytest.raises(LookupError, match="the labels listed have a probability of"):
        expected(position("7", likely))


def test_expected_score_stays_on_the_scale():
    values = [-1e-9, -0.1, -0.2, -0.69]
    assert all(
        expected(position("9", [{"token": "9", "logprob": v}]), label=9) == 9 for v in values
    )


@pytest.mark.parametrize("values", [None, {}, [], "x", {"content": None}, {"content": []}])
def test_missing_log_probabilities_are_refused(values):
    with pytest.raises(ValueError, match="the answer"):
        read_label_log_probs(values)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (position("7", None), "top_logprobs of the label is missing or null"),
        ({"token": "7", "logprob": -0.1}, "top_logprobs of the label is missing or null"),
        (position("7", []), r"top_logprobs of the label is \[\]"),
        (position("7", {"7": -0.1}), "top_logprobs of the label is"),
        (position("7", [None]), "an entry of top_logprobs is missing or null"),
        (position("7", [{"logprob": -0.1}]), "an entry of top_logprobs is"),
        (position("7", [{"token": "6", "logprob": None}]), "the logprob of the token '6'"),
        (position("7", [{"token": "6", "logprob": "-1"}]), "the logprob of the token '6'"),
        (position("7", [{"token": "6", "logprob": math.nan}]), "the logprob of the token '6'"),
        (position("7", [{"token": "6", "logprob": 0.9}]), "the logprob of the token '6'"),
    ],
)
def test_malformed_log_probabilities_of_a_label_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        read_label_log_probs({"content": [bad]})
    other = position("Hello", None)  # those of other tokens do not matter
    assert expected(other, None, position("7", top(_7=0.9))) == 7.0
