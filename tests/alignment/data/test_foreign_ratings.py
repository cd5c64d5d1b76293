"""Tests of ratings of rows and completions in files of other projects."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.row_files import MalformedRow
from tests.alignment.data.test_foreign_rows import OPENAI, ULTRAFEEDBACK, read, written


def test_thumbs_of_unpaired_preferences_are_scores(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": str(n), "label": n == 1} for n in range(2)]
    items = read(written(tmp_path, rows))
    assert [(x.labels[0].score, x.labels[0].is_scaled) for x in items] == [(0.0, True), (9.0, True)]
    # A label that is no rating is a column like any other.
    [item] = read(written(tmp_path, [{"prompt": "Q", "completion": "A", "label": "math"}]))
    assert not item.labels and item.record.prompt.metadata == {"label": "math"}


def test_completions_of_ultrafeedback_are_responses_with_scores(tmp_path: Path) -> None:
    row = {
        "source": "evol", "instruction": "Q", "models": ["m", "n"], "completions": [
            {"model": "m", "response": "A", "overall_score": 7.5, "annotations": {"x": 1}},
            {"model": "n", "response": "B", "overall_score": 3},
        ],
    }  # fmt: skip
    first, second = read(written(tmp_path, [row]))
    assert (first.record.text, first.record.source) == ("A", "m")
    assert [item.labels[0].score for item in (first, second)] == [7.5, 3]
    assert first.record.prompt == second.record.prompt


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
@pytest.mark.parametrize(
    "column, scores",
    [
        ("completions.helpfulness", [9, 4]),
        ("completions.overall_score", [1, 2]),
        ("completions.annotations.honesty.Rating", [5, 3]),
    ],
)
def test_named_ratings_of_completions_are_read(
    column: str, scores: list[int], name: str, tmp_path: Path
) -> None:
    items = read(written(tmp_path, [ULTRAFEEDBACK], name), f"score={column}")
    assert [[label.score for label in item.labels] for item in items] == [[s] for s in scores]


def test_columns_that_are_no_ratings_of_completions_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, [ULTRAFEEDBACK | {"mean": 3}])
    [texts] = read(file, "score=models")
    assert isinstance(texts, MalformedRow) and "the rating 'm' in models is neither" in str(texts)
    [single] = read(file, "score=mean")
    assert "mean must have one rating for each of the 2 completions" in str(single)
    [source] = read(file, "source=completions.model")
    assert "completions.model must be one value" in str(source)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Q", "response": "A"}, {"instruction": "Q", "output": "A"}, {"messages": OPENAI}],
)
def test_ratings_that_cannot_be_read_are_refused_next_to_others(row: Any, tmp_path: Path) -> None:
    values = ["N/A", "7/10", None, "", " 7 ", 3.5, 9, True]
    items = read(written(tmp_path, [row | {"score": value} for value in values]))
    assert all(isinstance(item, MalformedRow) for item in items[:2])
    assert "the rating '7/10' in score is neither a number" in items[1].reason
    assert "if score has no ratings, name it otherwise, as in --columns other=sc" in items[1].reason
    scores = [[label.score for label in item.labels] for item in items[2:]]
    assert scores == [[], [], [7], [3.5], [9], [9]]
    # A column without a single rating is a category.
    items = read(written(tmp_path, [row | {"label": value} for value in ("math", "code")]))
    assert [item.labels for item in items] == [[], []]


def test_ratings_after_the_first_rows_are_ratings_too(tmp_path: Path) -> None:
    row = {"prompt": "Q", "response": "A"}
    rows = [*[row | {"score": None}] * 120, row | {"score": 3}, row | {"score": "high"}]
    *_, rated, unread = read(written(tmp_path, rows))
    assert rated.labels[0].score == 3 and isinstance(unread, MalformedRow)


def test_missing_values_of_a_table_are_no_ratings(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "response": "A", "score": score} for score in (2.0, float("nan"))]
    items = read(written(tmp_path, rows, "mine.parquet"), "score=score")
    assert [len(item.labels) for item in items] == [1, 0]


@pytest.mark.parametrize("value, score", [("3", 3), (True, 9), (None, None), (4.5, 4.5)])
def test_ratings_of_completions_are_read_like_those_of_columns(
    value: Any, score: float | None, tmp_path: Path
) -> None:
    row = {"prompt": "Q", "completions": [{"response": "A", "overall_score": value}]}
    flat = {"prompt": "Q", "response": "A", "score": value}
    for each in (row, flat):
        [item] = read(written(tmp_path, [each]))
        assert [label.score for label in item.labels] == ([] if score is None else [score])
    [text] = read(written(tmp_path, [{"prompt": "Q", "completions": [
        {"response": "A", "overall_score": "7/10"}]}]))  # fmt: skip
    assert "the rating '7/10' in completions.overall_score is neither" in text.reason


def test_named_fields_of_lists_are_ratings_by_several_people(tmp_path: Path) -> None:
    row = {"prompt": "Q", "response": "A", "ratings": [{"value": 4}, {"value": None}, {"value": 2}]}
    [item] = read(written(tmp_path, [row]), "score=ratings.value")
    assert [label.score for label in item.labels] == [4, 2]
