"""Tests of studies and folders that the report refuses."""

from pathlib import Path
from typing import Any

import pytest

from alignment.commands.report import main
from alignment.evaluation.study.study_reader import read_study
from megatron_ext.errors import UserError
from tests.alignment.evaluation.small_study import (
    COURSES,
    entry,
    update_run,
    write_index,
    write_run,
    write_study,
)


def test_a_seed_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, "label", 3)
    entries = [entry("label", 3) | {"folder": name} for name in ("a", "b")]
    write_index(tmp_path, entries)
    with pytest.raises(UserError, match=r"lists seed 3 of 'label' on 'start' twice"):
        main([str(tmp_path)])
    write_index(tmp_path, [one | {"seed": seed} for seed, one in enumerate(entries, 1)])
    with pytest.raises(UserError, match=r"seed 1 for .*/a, whose run\.json has seed 3"):
        main([str(tmp_path)])
    for one in entries:
        del one["seed"]  # then run.json has the seed
    write_index(tmp_path, entries)
    with pytest.raises(UserError, match=r"lists seed 3 of 'label' on 'start' twice"):
        main([str(tmp_path)])
    update_run(tmp_path / "b", seed=4)
    main([str(tmp_path)])
    assert [run.seed for run in read_study(tmp_path).runs] == [3, 4]
    for name in ("a", "b"):
        update_run(tmp_path / name, seed=None)  # an unrecorded seed may differ
    main([str(tmp_path)])


def test_a_folder_twice_is_refused_however_it_is_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "label", 0)
    update_run(tmp_path / "a", seed=None)
    folders = ("a", "./a")
    write_index(tmp_path, [entry("label", n) | {"folder": f} for n, f in enumerate(folders)])
    with pytest.raises(UserError, match=r"has the folder '\./a' twice"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    "facts, message",
    [
        (
            {"settings": {"reward": "pairwise"}},
            "one has the mean score, and the other the win rate",
        ),
        ({"gold": {"name": "rule", "identity": "1a"}}, "their gold judges differ"),
        (
            {"gold": {"identity": "0a", "ensemble": [{"identity": "0a"}, {"identity": "1a"}]}},
            "their gold judges differ",
        ),
    ],
)
def test_runs_that_were_graded_otherwise_are_no_seeds_of_each_other(
    tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    write_study(tmp_path)
    run = tmp_path / "start-label-seed1"
    update_run(run, **facts)
    with pytest.raises(UserError, match=f"start-label-seed0 and .*start-label-seed1.*{message}"):
        main([str(tmp_path)])
    (run / "run.json").write_text("{}")  # which has no seed
    main([str(tmp_path)])


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("study.json", "{}", "study.json must have a list of runs"),
        ("study.json", "[1", "study.json is not JSON"),
        (
            "study.json",
            '{"runs": [{"folder": "x"}]}',
            "a run needs the keys folder, policy and judge",
        ),
        ("start-label-seed0/run.json", "[]", "run.json must contain one JSON object"),
        ("start-label-seed0/metrics.jsonl", "x\n{}\n", "line 1 is not JSON"),
        ("start-label-seed0/metrics.jsonl", '{"step": "a"}\n', "whose step is not a whole number"),
        ("start-label-seed0/metrics.jsonl", '{"step": 0, "grade/proxy": "9"}\n', "is not a number"),
        ("start-label-seed0/metrics.jsonl", '{"step": 1, "loss": 2}\n', "has a grading yet"),
        ("start-label-seed0/samples.jsonl", '{"step": 0}\n', "not a sample of a policy run"),
        (
            "start-label-seed0/samples.jsonl",
            '{"step": "a", "prompt": "p", "messages": [], "response": "", "scores": {}}\n',
            "step 'a', prompt 'p': not a sample of a policy run",
        ),
        (
            "start-label-seed0/samples.jsonl",
            '{"step": null, "prompt": "p", "messages": [], "response": "", "scores": {}}\n',
            "step None, prompt 'p': not a sample of a policy run",
        ),
    ],
)
def test_malformed_files_are_refused_in_a_sentence(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    write_study(tmp_path, seeds=1, courses={"label": COURSES["label"]})
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        main([str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study\.json and no run\.json"):
        main([str(tmp_path)])


@pytest.mark.parametrize("output", ["notes.txt", "notes.txt/report", "report"])
def test_an_output_that_is_no_folder_is_refused(tmp_path: Path, output: str) -> None:
    write_run(tmp_path / "a", "label", 0)
    file = tmp_path / "a" / output.partition("/")[0]
    file.write_text("mine")
    flags = [] if output == "report" else ["--output", str(tmp_path / "a" / output)]
    with pytest.raises(UserError, match=rf"/{file.name} is a file, .* another --output"):
        main([str(tmp_path / "a"), *flags])
    with pytest.raises(UserError, match=r"has no study\.json and no run\.json"):
        main([str(file)])
