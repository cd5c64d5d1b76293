"""Tests of labels of people as the gold verdicts of judges in training and in measurement."""

import csv
import json
from pathlib import Path

import pytest

from alignment.commands.agreement import main as agreement
from alignment.commands.annotate import main as annotate
from alignment.commands.data import main as data
from alignment.data.read_options import ReadOptions
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.kinds.function_judge import FunctionJudge
from alignment.judges.training_examples import read_labeled_questions
from alignment.record_files import read_all
from alignment.records import Outcome, Pair, Response, Side, Verdict
from megatron_ext.errors import UserError

STARS = {"ann": [5, 1, 3, 2], "bob": [4, 1, 3, 5]}
COLUMNS = ("prompt=ask", "response=reply", "score=stars", "annotator=who")


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    file = tmp_path / "ratings.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ask", "reply", "who", "stars", "reference"])
        for number in range(4):
            for who, stars in STARS.items():
                writer.writerow([f"Q{number}", f"A{number}", who, stars[number], number])
    return file


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    file = tmp_path / "arena.jsonl"
    rows = [
        {"prompt": f"Q{n}", "response_a": "x", "response_b": "y", "winner": winner}
        for n, winner in enumerate(["model_a", "tie", "model_b", None])
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_ratings_are_verdicts_on_their_scale(ratings: Path) -> None:
    options = ReadOptions.parse(COLUMNS)
    verdicts = read_verdicts(ratings, (1, 5), "--gold-scale", options)
    by_judge = {
        who: [v.score for v in verdicts if v.judge == who and v.sample == sample]
        for sample, who in enumerate(STARS)
    }
    assert by_judge == {who: [(s - 1) * 9 / 4 for s in stars] for who, stars in STARS.items()}
    with pytest.raises(UserError, match=r"ratings from 1 to 5\. State .* with --gold-scale LOW"):
        read_verdicts(ratings, None, "--gold-scale", options)
    with pytest.raises(UserError, match=r"ratings\.csv, row 2: the score 5 is outside"):
        read_verdicts(ratings, (0, 4), "--gold-scale", options)
    with pytest.raises(UserError, match="neither verdicts nor labels of people"):
        read_verdicts(ratings, (1, 5), "--gold-scale", ReadOptions.parse(COLUMNS[:2]))


def test_judge_learns_from_the_labels_of_people(ratings: Path, arena: Path) -> None:
    options = ReadOptions.parse(COLUMNS)
    rows = read_labeled_questions([str(ratings)], [str(ratings)], True, (1, 5), 1.0, options)
    assert len(rows) == 8
    assert [row.label for row in rows[:2]] == ["9", "7"]  # 5 and 4 stars
    few = read_labeled_questions(
        [str(ratings)], [str(ratings)], True, (1, 5), 1.0, ReadOptions.parse(COLUMNS, (), 2)
    )
    assert [row.gold for row in few] == [row.gold for row in rows[:4]]
    pairs = read_labeled_questions([str(arena)], [str(arena)], True)
    # Three pairs have labels, each in both orders.
    labels = {
        (row.question.item.prompt.messages[0].content, row.question.swapped): row.label
        for row in pairs
        if isinstance(row.question.item, Pair)
    }
    assert labels == {
        ("Q0", False): "A", ("Q0", True): "B", ("Q1", False): "tie", ("Q1", True): "tie",
        ("Q2", False): "B", ("Q2", True): "A",
    }  # fmt: skip


def test_import_writes_items_and_labels_that_belong_together(
    ratings: Path, arena: Path, tmp_path: Path
) -> None:
    items, gold = tmp_path / "items.parquet", tmp_path / "gold.jsonl"
    words = ["import", "--output", str(items), "--verdicts", str(gold), "--overwrite", "--input"]
    with pytest.raises(UserError, match=r"ratings\.csv, row 2: the rating 5 has no scale"):
        data([*words, str(ratings), "--columns", *COLUMNS])
    assert not items.exists() and not gold.exists()
    data([*words, str(ratings), "--columns", *COLUMNS, "--scale", "1", "5"])
    direct = read_verdicts(ratings, (1, 5), "", ReadOptions.parse(COLUMNS))
    assert read_all(gold, Verdict) == direct
    responses = read_all(items, Response)
    assert [r.id for r in responses] == list(dict.fromkeys(v.item for v in direct))
    assert [r.prompt.metadata for r in responses] == [{"reference": str(n)} for n in range(4)]
    data([*words, str(arena)])
    pairs = read_all(items, Pair)
    assert [(p.preferred, p.tied) for p in pairs] == [
        (Side.FIRST, False), (None, True), (Side.SECOND, False), (None, False),
    ]  # fmt: skip
    assert read_verdicts(items) == read_all(gold, Verdict) == read_verdicts(arena)
    assert [v.outcome for v in read_verdicts(gold)] == [
        Outcome.PREFERENCE, Outcome.TIE, Outcome.PREFERENCE,
    ]  # fmt: skip
    with pytest.raises(UserError, match="no labels of people for --verdicts"):
        data([*words, str(ratings), "--columns", *COLUMNS[:2]])


def test_chosen_responses_and_splits_keep_metadata(tmp_path: Path) -> None:
    raw, chosen = tmp_path / "raw.jsonl", tmp_path / "chosen.jsonl"
    rows = [
        {"prompt": f"word{n} " * 9, "chosen": f"good{n}", "rejected": "bad", "reference": str(n)}
        for n in range(9)
    ]
    raw.write_text("\n".join(map(json.dumps, rows)))
    data(["import", "--input", str(raw), "--output", str(chosen), "--as", "chosen", "--limit", "6"])
    assert [r.text for r in read_all(chosen, Response)] == [f"good{n}" for n in range(6)]
    save = tmp_path / "splits"
    data(["split", "--input", str(chosen), "--save", str(save), "--split", "a=3", "b=rest"])
    split = [*read_all(save / "a.jsonl", Response), *read_all(save / "b.jsonl", Response)]
    assert {r.text: r.prompt.metadata for r in split} == {
        f"good{n}": {"reference": str(n)} for n in range(6)
    }


def test_agreement_takes_people_as_the_gold_judge(
    ratings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ReadOptions.parse(COLUMNS)
    judged = tmp_path / "judged.jsonl"
    verdicts = [v for v in read_verdicts(ratings, (1, 5), "", options) if v.sample == 0]
    judged.write_text("\n".join(json.dumps(v.to_row()) for v in verdicts))
    folder = tmp_path / "agreement"
    agreement([str(ratings), str(judged), "--columns", *COLUMNS, "--first-scale", "1", "5",
               "--resamples", "20", "--output", str(folder)])  # fmt: skip
    assert "4 of 4 items are judged by both" in capsys.readouterr().out
    measured = json.loads((folder / "agreement.json").read_text())["all"]
    assert measured["agreement"]["exact"]["value"] == 1.0  # the first annotator against herself
    assert measured["first"]["self_consistency"]["value"] == 0.5  # the two of them, on two items


def test_functions_receive_the_metadata_of_the_prompt(ratings: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.py"
    file.write_text(
        "def score(response):\n    return 9 * response.text.endswith("
        "response.prompt.metadata['reference'])\n"
    )
    judge = FunctionJudge(f"{file}:score")
    items = read_all(ratings, Response, options=ReadOptions.parse(COLUMNS))
    try:
        assert [judge.verdict(item).score for item in items] == [9.0] * 4
    finally:
        judge.close()


def test_templates_are_checked_for_every_prompt_before_the_first_request(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{n}", "response": "A", "reference": r} for n, r in enumerate(["x", None])]
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--input", str(file), "--output", str(tmp_path / "out.jsonl")]
    judge = [
        "--judge",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--template",
        "pointwise-reference",
    ]
    with pytest.raises(UserError, match=r"--input: The template of the judge shows \{reference\}"):
        annotate([*flags, *judge])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
