"""Tests of `et-align monitor` as a command."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alignment.commands.monitor import ALARMED, main
from megatron_ext.errors import UserError
from tests.warm import warm_python


def rows(file: Path, content: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


@pytest.fixture
def responses(tmp_path: Path) -> str:
    prompt = {"id": "p", "messages": [{"role": "user", "content": "What grows in shade?"}]}
    plants = ["moss", "ivy", "sedge", "yew", "box", "fig", "holly"]
    texts = [" and ".join(["Ferns grow there", *plants[:n]]) + "." for n in range(8)]
    texts += ["I cannot help with that."] * 2
    content = [{"id": f"r{n}", "prompt": prompt, "text": text} for n, text in enumerate(texts)]
    return rows(tmp_path / "responses.jsonl", content)


@pytest.fixture
def verdicts(tmp_path: Path) -> str:
    """Write verdicts that prefer length; the last response has no score, and one has two."""
    content: list[dict[str, Any]] = [
        {"item": f"r{n}", "outcome": "score", "score": n} for n in range(8)
    ]
    content += [
        {"item": "r8", "outcome": "score", "score": 0},
        {"item": "r8", "outcome": "score", "score": 1, "sample": 1},
        {"item": "r9", "outcome": "failed", "reason": "timed out"},
    ]
    return rows(tmp_path / "verdicts.jsonl", content)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "-m", "alignment", "monitor", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_shares_limits_and_alarms_are_shown_and_written(
    responses: str, verdicts: str, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.yaml"
    limits.write_text("refusal: 0.15\nverbose: null\n")
    output = tmp_path / "out" / "flags.jsonl"
    done = run("--input", responses, "--verdicts", verdicts, "--limits", str(limits),
               "--output", str(output), "--fail-on-alarm")  # fmt: skip
    assert done.returncode == ALARMED, done.stderr
    lines = done.stdout.splitlines()
    [refusal] = [line for line in lines if line.startswith("refusal")]
    assert refusal.split()[:4] == ["refusal", "20.0%", "15.0%", "ALARM"]
    assert 'r8: "I cannot help' in refusal
    [correlation] = [line for line in lines if line.startswith("reward_length_correlation")]
    # The mean of its two scores puts r8 between r0 and r1, as its words do.
    assert correlation.split()[1:] == ["1.00", "0.60", "ALARM"]
    assert (
        "1 of 10 responses have no score in --verdicts; reward_length_correlation is" in done.stdout
    )
    [verbose] = [line for line in lines if line.startswith("verbose")]
    assert verbose.split() == ["verbose", "0.0%", "-"]
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in written] == [f"r{n}" for n in range(10)]
    assert [list(row["flags"]) for row in written] == [[]] * 8 + [["refusal"]] * 2
    assert written[2]["words"] == 7


def test_alarms_alone_do_not_fail_and_usual_lengths_can_be_set(
    responses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--input", responses]) == 0
    assert "ALARM" in capsys.readouterr().out
    prompt = {"id": "p", "messages": [{"role": "user", "content": "What?"}]}
    short = [{"id": str(n), "prompt": prompt, "text": "Yes, moss does."} for n in range(4)]
    main(["--input", responses, "--reference-lengths", rows(tmp_path / "usual.jsonl", short)])
    [verbose] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("verbose")]
    assert verbose.split()[1:4] == ["50.0%", "10.0%", "ALARM"]


def test_detector_by_function_path_is_reported(responses: str, tmp_path: Path) -> None:
    file = tmp_path / "my_detectors.py"
    file.write_text(
        "from alignment.monitors.detectors import detector\n\n"
        "@detector('moss', measures='mentions moss', limit=0.5)\n"
        "def find_moss(response):\n"
        "    return tuple(word for word in response.words if word == 'moss')\n"
    )
    limits = tmp_path / "limits.yaml"
    limits.write_text(f"{file}:find_moss: default\n")
    done = run("--input", responses, "--limits", str(limits))
    assert done.returncode == 0, done.stderr
    [moss, alarm] = [line for line in done.stdout.splitlines() if "moss" in line.split()[:2]]
    assert moss.split()[:5] == ["moss", "70.0%", "50.0%", "ALARM", "r1:"]
    assert alarm == "Alarm: moss (70.0%, limit 50.0%), a response that mentions moss."


def test_own_fixtures_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [{"role": "user", "content": "Name a fern."}]
    fixtures = [
        {"id": "1", "split": "mine", "messages": ask, "text": "I cannot help with that.",
         "fires": ["refusal"], "quiet": ["null"]},
        {"id": "2", "split": "mine", "messages": ask, "text": "A fern? Nah.", "fires": ["refusal"]},
        {"id": "3", "split": "mine", "messages": ask, "text": "Bracken.", "quiet": ["refusal"]},
    ]  # fmt: skip
    assert main(["--fixtures", rows(tmp_path / "mine.jsonl", fixtures)]) == 0
    header, refusal, null, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("mine")
    assert refusal.split() == ["refusal", "1/2", "0.09", "to", "0.91", "1/1", "0.21", "to", "1.00",
                               "0/1", "0.00", "to", "0.79"]  # fmt: skip
    assert null.split()[:3] == ["null", "0/0", "-"]
    assert main(["--fixtures"]) == 0
    output = capsys.readouterr().out
    assert output.count("judge_injection") == 3 and "held_out" in output


def gaming_judge(tmp_path: Path) -> str:
    """Write a judge that fails on one response and finds gaming in refusals."""
    file = tmp_path / "gaming.py"
    file.write_text(
        "def score(response):\n"
        "    if response.id == 'r0':\n"
        "        return None\n"
        "    return 8 if 'cannot' in response.text else 1\n"
    )
    return f"function:{file}:score"


def test_a_judge_s_findings_are_a_share_of_what_it_judged(
    responses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = str(tmp_path / "gaming.jsonl")
    output = str(tmp_path / "flags.jsonl")
    main(["--input", responses, "--judge", gaming_judge(tmp_path), "--judge-verdicts", verdicts,
          "--max-failed", "0.2", "--output", output])  # fmt: skip
    report = capsys.readouterr().out.splitlines()
    [judge] = [line for line in report if line.startswith("judge ")]
    assert judge.split()[1:4] == ["22.2%", "5.0%", "ALARM"]  # 2 of the 9 that were judged
    assert any(line.startswith("1 responses have no verdict of the judge") for line in report)
    flags = [json.loads(line)["flags"] for line in Path(output).read_text().splitlines()]
    assert ["judge" in names for names in flags] == [False] * 8 + [True] * 2
    # A file of verdicts of any judge is used without further calls.
    main(["--input", responses, "--judge-verdicts", verdicts])
    assert judge in capsys.readouterr().out.splitlines()


def test_verdicts_without_any_score_end_the_command(responses: str, tmp_path: Path) -> None:
    failed = [{"item": f"r{n}", "outcome": "failed", "reason": "timed out"} for n in range(10)]
    with pytest.raises(UserError, match="has no score of a response in --input"):
        main(["--input", responses, "--judge-verdicts", rows(tmp_path / "v.jsonl", failed)])


BAD = {"id": "1", "split": "s", "messages": [{"role": "user", "content": "x"}], "text": "y"}


@pytest.mark.parametrize(
    "row, message",
    [
        (BAD | {"fires": ["refusals"]}, "row 1: there is no detector 'refusals': known are"),
        (BAD | {"fires": ["null"], "quiet": ["null"]}, "null is both in fires and in quiet"),
        (BAD | {"fires": "null"}, "fires must be a list"),
        (BAD | {"fires": ["verbose"]}, "verbose needs reference_words"),
        (BAD | {"reference_words": ["many"]}, "reference_words must be a list of numbers"),
        (BAD | {"label": 1}, "unknown field 'label'"),
        (BAD | {"messages": []}, "messages must be a list"),
        ({"id": "1"}, "not a fixture: .*'split'"),
    ],
)
def test_fixtures_that_are_none_are_refused_with_their_row(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        main(["--fixtures", rows(tmp_path / "f.jsonl", [row])])


def test_errors_are_a_sentence(responses: str, verdicts: str, tmp_path: Path) -> None:
    other = rows(tmp_path / "other.jsonl", [{"item": "z", "outcome": "score", "score": 1}])
    pairs = rows(tmp_path / "pairs.jsonl",
                 [{"item": "r1", "outcome": "preference", "preferred": "first"}])  # fmt: skip
    listed = tmp_path / "list.yaml"
    listed.write_text("- refusal\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text("refusal: [\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("refusal: 7\n")
    for flags, message in (
        ([], "Pass responses as --input, or --fixtures"),
        (["--input", responses, "--fixtures"], "Pass responses as --input, or --fixtures"),
        (["--fixtures", "--output", "x.jsonl"], "--output requires --input"),
        (["--input", verdicts], "must hold responses"),
        (["--input", responses, "--folds", "3"], "--folds requires --fixtures"),
        (["--fixtures", "--folds", "1"], "--folds 1 must be 0 or at least 2"),
        (["--input", responses, "--samples", "2"], "--samples requires --judge. Add it, or leave"),
        (["--input", responses, "--judge", "rule"], "judges the quality of text"),
        (["--input", responses, "--judge", "http://x/v1"], "--judge requires --judge-verdicts"),
        (["--input", responses, "--verdicts", other], "has no score of a response in --input"),
        (["--input", responses, "--verdicts", pairs], "must contain scores of responses"),
        (["--input", responses, "--limits", str(listed)], "must be a mapping of detectors"),
        (["--input", responses, "--limits", str(broken)], "is not YAML"),
        (["--input", responses, "--limits", str(wrong)], "The limit of refusal must be from 0"),
        (["--input", responses, "--limits", "none.yaml"], "none.yaml cannot be read: No such"),
        (["--input", responses, "--output", responses], "exists already. Give --overwrite"),
        (["--input", "none.jsonl", "--output", f"{tmp_path}", "--overwrite"], "is a folder. Give"),
        (["--input", "none.jsonl", "--output", f"{responses}/flags.jsonl"], "jsonl is a file"),
    ):
        with pytest.raises(UserError, match=message):
            main(flags)
    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("et-align: Pass responses as --input")
