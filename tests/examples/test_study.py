"""Tests of the study in miniature: its data by hand, and all of it with an untrained model."""

import json
import random
import subprocess
from typing import Any

import pytest
import yaml

from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.registry import read_judge
from alignment.record_files import read_all
from alignment.records import Response
from examples.alignment.study.__main__ import DEFAULT
from examples.alignment.study.labels import CORRUPTIONS
from examples.alignment.study.labels import main as labels
from examples.alignment.study.passages import main as passages
from examples.alignment.study.passages import passages as neighbours
from examples.alignment.study.plan import StudyPlan, read_settings
from megatron_ext.errors import UserError
from tests.distributed import ROOT
from tests.megatron import TINY
from tests.pretraining import train
from tests.warm import warm_python
from tools.train_tokenizer import train_sentencepiece

NAMES = (
    "cow",
    "bird",
    "house",
    "river",
    "stone",
    "tree",
    "road",
    "boat",
    "horse",
    "field",
    "cloud",
)
VERBS = ("sees", "finds", "takes", "likes", "makes", "holds", "paints", "moves")


def test_study_passages_are_neighbours_of_fitting_lengths():
    short, fits = "Too short here.", "This sentence has just six words."
    follows = "And this one, which follows it, has nine words."
    text = f"{short} {fits} {follows} {fits.replace('six', 'some')}"
    assert list(neighbours(text)) == [(fits, follows)]


def test_study_spoils_responses_in_every_way(tmp_path):
    draw = random.Random(0)
    text, prompt, other = "one two three four five six", "seven eight nine", "ten eleven"
    made = {name: spoil(text, prompt, other, draw) for name, spoil in CORRUPTIONS.items()}
    assert made["real"] == text and made["off-topic"] == other
    assert sorted(made["shuffled"].split()) == sorted(text.split()) != made["shuffled"].split()
    assert text.startswith(made["cut"]) and 0 < len(made["cut"]) < len(text)
    assert len(made["repeated"].split()) == 6 and made["repeated"].startswith("one")
    mixed = made["mixed"].split()
    assert [word for word in mixed if word in text.split()] == text.split()
    assert set(mixed) <= {*text.split(), *prompt.split()}


def sentence(draw, length):
    words = [draw.choice(NAMES if place % 2 else VERBS) for place in range(length - 1)]
    return f"The {' '.join(words)}."


def write_text(file, documents=60):
    draw = random.Random(1)
    with file.open("w") as lines:
        for _ in range(documents):
            text = " ".join(sentence(draw, draw.randint(8, 12)) for _ in range(6))
            lines.write(json.dumps({"text": text}) + "\n")


def test_study_labels_share_no_prompt(tmp_path):
    write_text(tmp_path / "text.jsonl")
    real = tmp_path / "real.jsonl"
    passages(["--text", str(tmp_path / "text.jsonl"), "--output", str(real)])
    rows = read_all(real, Response)
    sampled_file = tmp_path / "start_responses.jsonl"
    with sampled_file.open("w") as file:
        for row in rows:
            made = {**row.to_row(), "id": row.prompt.id, "text": "start"}
            file.write(json.dumps(made) + "\n")
    words = [
        "--real",
        str(real),
        "--start-responses",
        str(sampled_file),
        "--save",
        str(tmp_path / "out"),
    ]
    labels([*words, "--validation", "5", "--test", "7"])
    parts = {n: read_all(tmp_path / "out" / f"{n}.jsonl", Response) for n in ("validation", "test")}
    parts["train"] = read_all(tmp_path / "out" / "train.jsonl", Response)
    prompts = {name: {row.prompt.id for row in part} for name, part in parts.items()}
    assert [len(prompts[name]) for name in parts] == [5, 7, len(rows) - 12]
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert all(part[0].text == "start" != part[1].text for part in parts.values())
    with pytest.raises(UserError, match="none is left for training"):
        labels([*words, "--validation", "5", "--test", str(len(rows))])


def test_study_plan_requires_every_section(tmp_path):
    file = tmp_path / "study.yaml"
    settings = dict(read_settings(DEFAULT))
    del settings["label"]
    file.write_text(yaml.safe_dump({**settings, "colour": 1}))
    with pytest.raises(UserError, match=r"must have the sections .*\. Correct colour, label"):
        read_settings(file)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [("base", None, "base must be a mapping"), ("judge", {"lr": 1}, "judge must have seq_length")],
)
def test_study_refuses_missing_files_before_it_starts(tmp_path, section, value, message):
    settings = dict(read_settings(DEFAULT)) | {section: value}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "study.yaml")


def test_study_commands_parse(tmp_path):
    from alignment.commands.generate_config import parse as generate
    from alignment.commands.judge_config import parse as judge
    from alignment.commands.train_judge import parse as train_judge
    from alignment.commands.train_policy import parse as train_policy

    study = StudyPlan(tmp_path, read_settings(DEFAULT), ranks=1, on_gpus=False)
    models = [f"seed1/judges/{name}" for name in ("label", "reasoning", "rl")]
    for model in ("start", *models):
        (tmp_path / model / "best").mkdir(parents=True)
    parsers: dict[str, Any] = {
        "train-judge": train_judge,
        "train-policy": train_policy,
        "judge": judge,
    }
    parsers["generate"] = generate
    commands: dict[str, Any] = {}
    for phase in study.phases([1]):
        for one in phase:
            if parser := parsers.get(one.command[2]):
                commands[one.name] = parser(one.command[3:])
    assert commands["reasoning-judge-seed1"].format.thinking == "asked"
    rl = commands["rl-judge-seed1"]
    assert rl.stage == "rl" and rl.batch.batch_size == 64
    assert rl.model.model.endswith("reasoning/best")
    assert commands["reasoning-verdicts-seed1"].answers.judging_top_k == 20
    assert len([name for name in commands if name in ("label-seed1", "reasoning-seed1")]) == 2
    spec = read_judge(commands["reasoning-seed1"].judge[0])
    assert isinstance(spec, LocalJudgeConfig)
    assert (spec.thinking, spec.top_k, spec.max_new_tokens) == ("asked", 20, 48)
    assert spec.model.endswith("seed1/judges/rl/best")


def make_quickstart(folder):
    """Make the parts of a quickstart that a study uses: a text and a run on its tokenizer."""
    (folder / "data").mkdir(parents=True)
    write_text(folder / "data" / "text.jsonl")
    texts = [json.loads(line)["text"] for line in (folder / "data" / "text.jsonl").open()]
    tokenizer = folder / "data" / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(texts, 320, 1.0))
    train(
        [
            *TINY, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer,
            "--vocab-size", 320, "--seq-length", 512, "--max-position-embeddings", 512,
            "--train-iters", 1, "--run-dir", folder,
        ],
        ranks=1,
    )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_runs_from_text_to_the_page(tmp_path):
    quickstart = make_quickstart(tmp_path / "quickstart")
    settings = dict(read_settings(DEFAULT))
    small = {"seq_length": 512, "max_new_tokens": 6}
    settings |= {
        "splits": {"held_out": 8, "policy": 40, "judge": 40},
        "labels": {"validation": 5, "test": 10},
        "start": {"epochs": 1, "batch_size": 32, "seq_length": 512, "lr": 1e-3},
        "generate": {"max_new_tokens": 6},
        "judge": {"batch_size": 16, "seq_length": 512, "lr": 1e-3, "eval_interval": 50},
        "label": {"epochs": 1},
        "policy": {
            **small, "steps": 2, "batch_size": 8, "group_size": 4, "mini_batches": 1,
            "eval_interval": 2, "max_unrewarded": 1,
        },
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    command = [
        *(warm_python(), "-m", "examples.alignment.study", str(tmp_path / "study.yaml")),
        *("--quickstart", str(quickstart), "--output", str(tmp_path / "run"), "--jobs", "2"),
        *("--judges", "label", "gold"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "With one seed there is no interval" in done.stdout or "1 seed" in done.stdout
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
    runs = json.loads((tmp_path / "run" / "study.json").read_text())["runs"]
    assert [run["folder"] for run in runs] == ["label-seed1", "gold-seed1"]
    for run in runs:
        about = json.loads((tmp_path / "run" / run["folder"] / "run.json").read_text())
        assert about["steps"] == 2
        agreement = about["judge"]["agreement"]
        assert (agreement is None) == (run["judge"] == "gold itself")
        rows = [json.loads(x) for x in (tmp_path / "run" / run["folder"] / "metrics.jsonl").open()]
        assert [row["step"] for row in rows if "grade/gold" in row] == [0, 2]
        assert all("grade/second_gold" in row for row in rows if "grade/gold" in row)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and " ..." not in again.stdout, again.stdout
