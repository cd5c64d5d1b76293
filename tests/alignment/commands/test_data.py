"""Tests of `et-align data`: import, split, count."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.commands.data import main
from alignment.data.dataset_schemas import read_records
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response
from megatron_ext.errors import UserError

WORDS = [f"word{n}" for n in range(500)]


def preferences(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Return rows in the columns of Tulu 3; every tenth prompt is a near-duplicate."""
    rng, questions = random.Random(seed), [""]
    for number in range(count):
        questions = [*questions[:-1], "more"] if number % 10 == 9 else rng.choices(WORDS, k=20)
        turn = {"role": "user", "content": " ".join(questions)}
        answers = [[turn, {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=40))}]
                   for _ in range(2)]  # fmt: skip
        yield {
            "id": f"row-{number}", "source": f"set{number % 3}", "prompt": turn["content"],
            "chosen": answers[0], "rejected": answers[1],
        }  # fmt: skip


def written(file: Path, rows: Iterator[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_from_preferences_to_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, pairs = written(tmp_path / "raw.jsonl", preferences(600)), str(tmp_path / "p.parquet")
    main(["import", "--input", raw, "--output", pairs])
    assert "Read " in capsys.readouterr().out
    main(["count", "--input", pairs])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["source", "pairs", "first", "second"]
    assert [row[:2] for row in table[1:]] == [
        ["set0", "200"], ["set1", "200"], ["set2", "200"], ["total", "600"],
    ]  # fmt: skip
    for source in table[1:]:
        assert int(source[2]) + int(source[3]) == int(source[1])
    save = tmp_path / "splits"
    main(["split", "--input", pairs, "--save", str(save), "--split", "test=50", "train=rest"])
    test, train = (list(read_records(save / f"{name}.jsonl")) for name in ("test", "train"))
    about = json.loads((save / "split.json").read_text())["splits"]
    assert about["test"] == {"prompts": 50, "rows": 50, "near": 0} and len(test) == 50
    assert about["train"]["rows"] == len(train) == 550 - about["train"]["near"]
    assert about["train"]["near"] > 0
    assert {row.id for row in test if isinstance(row, Pair)}.isdisjoint(
        row.id for row in train if isinstance(row, Pair)
    )
    with pytest.raises(UserError, match="already exists"):
        main(["split", "--input", pairs, "--save", str(save), "--split", "train=rest"])


def test_records_of_several_kinds_share_one_split(tmp_path: Path) -> None:
    raw, files = written(tmp_path / "raw.jsonl", preferences(60)), []
    for kind in ("pairs", "chosen", "prompts"):
        files.append(str(tmp_path / f"{kind}.jsonl"))
        main(["import", "--input", raw, "--output", files[-1], "--as", kind])
    save = tmp_path / "splits"
    main(["split", "--input", *files, "--save", str(save), "--split", "test=20", "train=rest"])
    questions: dict[str, set[str]] = {}
    for name in ("test", "train"):
        texts = []
        for kind in ("pairs", "responses", "prompts"):
            lines = (save / f"{name}-{kind}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            texts.append({row.get("prompt", row)["messages"][-1]["content"] for row in rows})
        assert texts[0] == texts[1] == texts[2]
        questions[name] = texts[0]
    assert len(questions["test"]) == 20
    assert questions["train"] and questions["test"].isdisjoint(questions["train"])
    about = json.loads((save / "split.json").read_text())["splits"]
    assert about["test"] == {"prompts": 20, "rows": 60, "near": 0}


def test_pairs_as_responses_and_as_prompts(tmp_path: Path) -> None:
    raw = written(tmp_path / "raw.jsonl", preferences(5))
    for kind, record, count in (("responses", Response, 10), ("prompts", Prompt, 5)):
        file = tmp_path / f"{kind}.jsonl"
        main(["import", "--input", raw, "--output", str(file), "--as", kind])
        rows = list(read_records(file))
        assert len(rows) == len({row.id for row in rows if isinstance(row, record)}) == count
    with pytest.raises(UserError, match="--as pairs is not possible"):
        main(["import", "--input", str(tmp_path / "responses.jsonl"),
              "--output", str(tmp_path / "x.jsonl"), "--as", "pairs"])  # fmt: skip
    assert not (tmp_path / "x.jsonl").exists()


def test_rows_with_an_id_that_was_there_are_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = written(tmp_path / "raw.jsonl", preferences(30))
    again = written(tmp_path / "again.jsonl", preferences(30))
    save = tmp_path / "splits"
    main(["split", "--input", raw, again, "--save", str(save), "--split", "all=rest"])
    assert "Left out 30 rows with the id of an earlier row" in capsys.readouterr().out
    assert len(list(read_records(save / "all.jsonl"))) == 30


def test_repeated_rows_are_written_once_and_ids_of_other_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{key: row[key] for key in ("chosen", "rejected")} for row in preferences(8)]
    first = written(tmp_path / "first.jsonl", iter([*rows, *rows[:3]]))
    second = written(tmp_path / "second.jsonl", iter(rows[:2]))
    file = tmp_path / "out.jsonl"
    main(["import", "--input", first, second, "--output", str(file)])
    assert "Left out 5 rows that repeat an earlier one" in capsys.readouterr().out
    assert len({row.id for row in read_all(file, Pair)}) == 8
    main(["import", "--input", first, "--output", str(file), "--as", "prompts", "--overwrite"])
    assert len({row.id for row in read_all(file, Prompt)}) == 8
    clash = written(tmp_path / "clash.jsonl", (row | {"id": n % 4} for n, row in enumerate(rows)))
    words = ["import", "--input", clash, "--output", str(file), "--overwrite"]
    main(words)
    assert "Left out 4 rows with the id of another row" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 rows have the id of another row, the last being '0'"):
        main([*words, "--max-malformed", "0"])


def test_left_out_rows_and_columns_are_reported_with_their_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = list(preferences(6))
    for row in rows[:2]:
        row["chosen"][1]["tool_calls"] = [{"type": "function"}]
    rows[2]["rejected"][0]["role"] = "critic"
    for row in rows:
        row["chosen_model"] = "m"
    raw, file = written(tmp_path / "raw.jsonl", iter(rows)), tmp_path / "out.jsonl"
    main(["import", "--input", raw, "--output", str(file)])
    printed = capsys.readouterr().out
    assert "Left out 3 malformed rows: 2 as in " in printed and "'tool_calls'" in printed
    assert "1 as in" in printed and "not 'critic'" in printed
    assert "raw.jsonl as preferences (chosen, rejected): 3 records" in printed
    assert "metadata: chosen_model" in printed
    none = written(tmp_path / "none.jsonl", iter(rows[:3]))
    with pytest.raises(UserError, match=r"no rows that can be used: 2 as in .*'tool_calls'"):
        main(["import", "--input", none, "--output", str(file), "--overwrite"])


def test_ties_give_no_preferred_answer_and_are_not_malformed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, file = tmp_path / "table.csv", tmp_path / "out.jsonl"
    rows = [f"q{number},x{number},y{number},tie,ann" for number in range(150)]
    table.write_text(
        "\n".join(["question,answer_a,answer_b,winner,annotator", *rows, "q,a,b,b,bob"])
    )
    main(["import", "--input", str(table), "--output", str(file), "--as", "chosen"])
    printed = capsys.readouterr().out
    assert "Left out 150 rows: 150 as in " in printed and "no side of the pair is" in printed
    assert "malformed" not in printed and "--verdicts" not in printed
    [response] = read_records(file)
    assert isinstance(response, Response) and response.text == "b"


def test_malformed_rows_are_counted_and_too_many_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = list(preferences(10))
    rows[3] = rows[3] | {"chosen": []}
    rows[5] = rows[5] | {"rejected": rows[5]["chosen"]}
    raw, file = written(tmp_path / "raw.jsonl", iter(rows)), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"1 rows cannot be used, .*raw\.jsonl, row 4: chosen"):
        main(["import", "--input", raw, "--output", str(file), "--max-malformed", "0"])
    assert not file.exists()
    main(["import", "--input", raw, "--output", str(file)])
    output = capsys.readouterr().out
    assert "Left out 1 malformed rows" in output and "Left out 1 pairs of a response with" in output
    assert len(list(read_records(file))) == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (["import", "--output", "x.jsonl"], "either files as --input or a --package"),
        (
            ["import", "--output", "x.jsonl", "--input", "a", "--archive", "b"],
            "--archive requires --package",
        ),
        (["import", "--output", "x.csv", "--package", "hhh"], "must end with .jsonl or .parquet"),
        (["import", "--output", "x.jsonl", "--input", "none.jsonl"], "none.jsonl does not exist"),
        (
            ["count", "--input", "x", "--max-malformed", "-1"],
            "-1 must be at least 0",
        ),
        (["split", "--input", "x", "--save", "y", "--split", "a=b"], "Give NAME=1000"),
    ],
)
def test_impossible_requests_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def peak(*words: str) -> int:
    """Return the peak memory of a command in bytes."""
    tracemalloc.start()
    main(words)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    small = written(tmp_path / "small.jsonl", preferences(600))
    large = written(tmp_path / "large.jsonl", preferences(4000))
    out = str(tmp_path / "out.jsonl")
    peak("import", "--input", small, "--output", out, "--overwrite")  # caches fill
    peaks = {}
    for size, file in (("small", small), ("large", large)):
        peaks[size] = [
            peak("import", "--input", file, "--output", out, "--overwrite"),
            peak("count", "--input", file),
            peak("split", "--input", file, "--save", str(tmp_path / size), "--split", "a=0.5",
                 "b=rest"),
        ]  # fmt: skip
    grown = [large - small for small, large in zip(peaks["small"], peaks["large"])]
    more = 4000 - 600
    # Import and split hold numbers for each row or prompt, and none of the text.
    assert grown[0] < 150 * more and grown[2] < 400 * more, peaks
    assert grown[1] < 200_000, peaks  # the large file has 5 MB
