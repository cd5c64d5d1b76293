"""Tests of scores of files, which are on the scale of 0 to 9 or refused."""

import json

import pytest

from alignment.judges.formats.labels import label_of
from alignment.judges.formats.scale import check_scale, read_verdicts, rescale
from alignment.judges.results import commonest, require_results
from alignment.records import Outcome, Verdict
from megatron_ext.errors import TooFewResults, UserError


def verdicts(tmp_path, *scores):
    file = tmp_path / "verdicts.jsonl"
    rows = [{"item": str(i), "outcome": "score", "score": score} for i, score in enumerate(scores)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_scores_outside_of_the_scale_are_refused_by_file_and_row(tmp_path):
    file = verdicts(tmp_path, 0, 9, 4.5, 9.0000000001)
    assert [v.score for v in read_verdicts(file)] == [0, 9, 4.5, 9]
    for bad, scale in ((9.5, None), (-1, None), (101, [0, 100]), (0, [1, 10])):
        file = verdicts(tmp_path, 5, bad)
        with pytest.raises(UserError, match=rf"verdicts\.jsonl, row 2: the score {bad} is outside"):
            read_verdicts(file, scale)
    with pytest.raises(UserError, match="State the scale of its scores with --gold-scale"):
        read_verdicts(verdicts(tmp_path, 70), flag="--gold-scale")


@pytest.mark.parametrize(
    ("bad", "words"),
    [("NaN", "NaN is not JSON"), ("Infinity", "Infinity is not JSON")]
    + [(bad, "score must be a finite number") for bad in ("true", '"7"', "[7]", "1e999")],
)
def test_scores_that_are_not_finite_are_refused_by_file_and_row(tmp_path, bad, words):
    file = tmp_path / "verdicts.jsonl"
    file.write_text(f'{{"item": "a", "outcome": "score", "score": {bad}}}\n')
    with pytest.raises(UserError, match=rf"verdicts\.jsonl, row 1: .*{words}"):
        read_verdicts(file)


def test_scores_of_a_stated_scale_are_mapped_linearly(tmp_path):
    file = verdicts(tmp_path, 1, 10, 5.5)
    assert [v.score for v in read_verdicts(file, [1, 10])] == pytest.approx([0, 9, 4.5], rel=1e-12)
    assert rescale(-1, [-1, 1]) == 0 and rescale(1, [-1, 1]) == 9


@pytest.mark.parametrize("scale", [[9, 0], [1, 1], [0, float("nan")], [0, float("inf")], [1]])
def test_scale_without_length_is_refused(scale):
    with pytest.raises(UserError, match="--gold-scale"):
        check_scale(scale, "--gold-scale")


def test_label_of_verdict_is_nearest_and_never_clamped():
    def label(score):
        return label_of(Verdict("a", Outcome.SCORE, score))

    assert [label(s) for s in (0, 0.49, 0.5, 7.5, 8.4, 9)] == ["0", "0", "1", "8", "8", "9"]
    for outside in (-0.6, 9.4, 40):
        with pytest.raises(ValueError, match="outside of the scale"):
            label(outside)


def test_commonest_reason_ignores_numbers_and_quotations():
    reasons = ["cut off after 3 tokens", "no label", "cut off after 9 tokens", "says 'a'"]
    assert commonest(reasons) == "cut off after 3 tokens (2 times)"
    assert commonest(["no label"]) == "no label (once)"


def test_require_results_refuses_more_than_the_allowed_share():
    require_results(["x"], 20, 0.05)
    require_results([], 0, 0.0)
    with pytest.raises(TooFewResults, match="2 of 20 questions have no verdict") as failed:
        require_results(["x", "x"], 20, 0.05)
    assert failed.value.status == 3
