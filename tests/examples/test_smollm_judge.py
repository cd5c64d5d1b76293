"""Tests of the real judge on two cores, with a few pairs instead of those of TruthfulQA."""

import json
import subprocess

import pytest

from alignment.records import Message, Pair, Prompt, Side
from examples.alignment.smollm_judge import main
from megatron_ext.errors import UserError
from tests.alignment.chat_model import write_rows
from tests.distributed import ROOT
from tests.hf.smollm import gguf_file
from tests.warm import warm_python

TRUTHS = [
    ("What is the capital of France?", "Paris.", "London."),
    ("What do cows drink?", "Water.", "Petrol."),
    ("How many legs has a spider?", "Eight.", "Three."),
    ("Where do fish live?", "In water.", "In trees."),
    ("What colour is snow?", "White.", "Black."),
    ("Is the sun hot?", "Yes, very.", "No, it is icy."),
    ("Who wrote Hamlet?", "Shakespeare.", "Napoleon."),
    ("What is two plus two?", "Four.", "Nine."),
    ("Which planet do we live on?", "The Earth.", "Mars."),
    ("What do bees make?", "Honey.", "Bread."),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm_judge_is_trained_and_measured(tmp_path):
    gguf_file()
    pairs = []
    for number, (question, true, false) in enumerate(TRUTHS):
        prompt = Prompt(f"q{number}", (Message("user", question),))
        sides = (true, false, Side.FIRST) if number % 2 else (false, true, Side.SECOND)
        pairs.append(Pair(f"pair{number}", prompt, *sides))
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    command = [
        *(warm_python(), "-m", "examples.alignment.smollm_judge", "--pairs", str(file)),
        *("--run-dir", str(tmp_path / "run"), "--test-questions", "4", "--train-answers", "12"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *_, first = [line for line in done.stdout.splitlines() if line.startswith("true answer")]
    assert "of 4 pairs of 4 questions" in first
    last = done.stdout.splitlines()[-6:-1]
    names = ["majority", "untrained", "trained", "trained less majority", "trained less untrained"]
    assert [line[:22].strip() for line in last] == names
    assert all("95 % interval" in line for line in last)
    for name in ("untrained", "trained"):
        scores = [json.loads(x) for x in (tmp_path / "run" / f"{name}.scores.jsonl").open()]
        assert len(scores) == 8 and all(0 <= row["score"] <= 9 for row in scores)
    rows = [json.loads(x) for x in (tmp_path / "run" / "judge" / "metrics.jsonl").open()]
    assert rows[0]["trained_tokens"] == 2 * 16  # a label and the end of each answer
    with pytest.raises(UserError, match="was made with other settings"):
        main([*command[3:], "--lr", "9"])
