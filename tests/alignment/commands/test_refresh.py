"""Tests of retraining a judge on its policy's responses, as in docs/how-to/training-policies.md."""

import json
import random

import pytest

from alignment.record_files import read_all
from alignment.records import Message, Prompt, Response
from tests.alignment.chat_model import BRIEF, make_model, write_rows
from tests.distributed import run_ranks

GOLD = """
def score(response):
    return min(9, len(response.text) // 6)
"""


def old_items(count, seed):
    """Write items of one to twelve words; their gold score is their length."""
    draw = random.Random(seed)
    return [
        Response(
            f"old-{seed}-{n}",
            Prompt(f"old-{seed}-{n}", (Message("user", "say good"),)),
            " ".join(draw.choices(["good", "house", "river", "stone"], k=draw.randint(1, 12))),
        )
        for n in range(count)
    ]


def refresh(place):
    """Return the exit codes of the commands on one rank."""
    from alignment.commands.annotate import main as annotate
    from alignment.commands.judge import main as judge
    from alignment.commands.promote import main as promote
    from alignment.commands.train_judge import main as train_judge
    from alignment.commands.train_policy import main as train_policy

    def call(command, *words):
        return command([str(word) for word in words])

    gold = f"function:{place / 'gold.py'}:score"
    form = ("--template", place / "pointwise-brief.txt", "--seq-length", 384)
    codes = [
        call(
            train_policy, "--model", place / "model", "--run-dir", place / "run", "--steps", 3,
            "--prompts", place / "prompts.jsonl", "--judge", place / "judge.yaml",
            "--held-out", place / "held_out.jsonl", "--gold", place / "gold.yaml",
            "--batch-size", 32, "--group-size", 4, "--mini-batches", 1, "--max-new-tokens", 16,
            "--temperature", 1, "--seq-length", 384, "--lr", 1e-4, "--micro-batch-size", 8,
            "--keep-responses", 32, "--no-reference",
        )
    ]  # fmt: skip
    rows = [
        row
        for file in sorted((place / "run" / "responses").iterdir())
        for row in read_all(file, Response)
    ]
    write_rows(place / "new.train.jsonl", rows[:64])
    write_rows(place / "new.jsonl", rows[64:])
    for part in ("old.train", "new.train", "old", "new"):
        words = ("--input", place / f"{part}.jsonl", "--output", place / f"{part}.gold.jsonl")
        codes.append(call(annotate, "--judge", gold, *words))
    codes.append(
        call(
            train_judge, "--stage", "sft", "--model", place / "model", "--run-dir", place / "judge",
            "--input", place / "old.train.jsonl", place / "new.train.jsonl",
            "--gold", place / "old.train.gold.jsonl", place / "new.train.gold.jsonl", *form,
            "--batch-size", 16, "--epochs", 8, "--lr", 3e-3, "--micro-batch-size", 8,
        )
    )  # fmt: skip
    verdict_flags = []
    for who, model in (("current", place / "current"), ("candidate", place / "judge" / "best")):
        for part in ("old", "new"):
            output = place / f"{part}.{who}.jsonl"
            flags = ("--model", model, "--input", place / f"{part}.jsonl", "--output", output)
            codes.append(call(judge, *flags, *form))
            verdict_flags += [f"--{part}-{who}", output]
    for part in ("old", "new"):
        verdict_flags += [f"--{part}-gold", place / f"{part}.gold.jsonl"]
    folders = ("--candidate", place / "judge" / "best", "--current", place / "current")
    codes.append(call(promote, *folders, *verdict_flags, "--resamples", 300))
    return codes, [row.source for row in rows]


@pytest.mark.slow
def test_a_judge_is_trained_again_on_its_policys_responses_and_promoted(tmp_path):
    for name in ("model", "current"):
        make_model(tmp_path / name, num_hidden_layers=1, max_position_embeddings=384)
    (tmp_path / "gold.py").write_text(GOLD)
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    (tmp_path / "gold.yaml").write_text(f"kind: function\nfunction: {tmp_path / 'gold.py'}:score\n")
    (tmp_path / "judge.yaml").write_text(
        f"kind: local\nmodel: {tmp_path / 'current'}\nlength: 384\n"
        f"template: {tmp_path / 'pointwise-brief.txt'}\n"
    )
    for name, count in (("prompts", 24), ("held_out", 4)):
        prompts = [Prompt(f"{name}-{n}", (Message("user", f"say {n}"),)) for n in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", prompts)
    write_rows(tmp_path / "old.train.jsonl", old_items(96, 1))
    write_rows(tmp_path / "old.jsonl", old_items(40, 2))
    [(codes, sources)] = run_ranks(refresh, 1, tmp_path)
    assert codes == [0] * 11
    assert sources == [f"policy at step {step}" for step in (1, 2, 3) for _ in range(32)]
    promoted = json.loads((tmp_path / "current" / "promoted.json").read_text())
    assert promoted["from"].endswith("judge/best")
    best = {file.name: file.read_bytes() for file in (tmp_path / "judge" / "best").iterdir()}
    current = {name: (tmp_path / "current" / name).read_bytes() for name in best}
    assert current == best
