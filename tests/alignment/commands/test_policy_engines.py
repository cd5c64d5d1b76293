"""Tests of `train-policy` with DeepSpeed: exact resumption, and the same start as with Megatron."""

import json
import os
import signal
import time
from unittest import mock

import pytest

from alignment.records import Message, Prompt
from tests.alignment.chat_model import make_model, write_rows
from tests.distributed import run_ranks

TIMES = ("seconds", "time/", "share/", "tokens_per_s")  # differ from run to run


def train(folder, run, steps, engine, dies_after=None):
    """Return the exit code of `train-policy`, or None if the process kills itself after a step."""
    from alignment.commands.train_policy import main
    from alignment.training.training_run import TrainingRun

    log = TrainingRun.log

    def log_and_die(self, row):
        log(self, row)
        if row["step"] == dies_after:
            if not self.writes:
                time.sleep(3600)  # killed together with rank 0, after that rank has written its row
            os.kill(os.getpid(), signal.SIGKILL)

    words = [
        *("--model", folder / "model", "--run-dir", run, "--steps", steps, "--engine", engine),
        *("--prompts", folder / "prompts.jsonl", "--held-out", folder / "held_out.jsonl"),
        *("--judge", folder / "rule.yaml", "--gold", folder / "other.yaml"),
        *("--batch-size", 16, "--group-size", 4, "--mini-batches", 1, "--micro-batch-size", 4),
        *("--max-new-tokens", 12, "--seq-length", 96, "--temperature", 0.8, "--lr", 1e-2),
        *("--eval-interval", 2, "--save-interval", 2),
    ]
    with mock.patch.object(TrainingRun, "log", log_and_die):
        return main([str(word) for word in words])


def rows_of(run):
    """Return the rows of metrics without the values that depend on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in row.items() if not n.startswith(TIMES)} for row in rows]


@pytest.mark.slow
def test_policy_on_deepspeed_resumes_after_a_kill_and_starts_as_on_megatron(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=128)
    for name, count in (("prompts", 24), ("held_out", 6)):
        messages = [Message("user", f"say good {name} {n}") for n in range(count)]
        prompts = [Prompt(f"{name}-{n}", (message,)) for n, message in enumerate(messages)]
        write_rows(tmp_path / f"{name}.jsonl", prompts)
    (tmp_path / "text.txt").write_text("\n".join(f"the house is good {n % 7}" for n in range(400)))
    rule = f"kind: rule\nrule_text: {tmp_path / 'text.txt'}\n"
    (tmp_path / "rule.yaml").write_text(rule)
    (tmp_path / "other.yaml").write_text(f"{rule}rule: no-copying\n")

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(train, 2, tmp_path, whole, 3, "deepspeed") == [0, 0]
    with pytest.raises(RuntimeError, match="died without an exception"):
        run_ranks(train, 2, tmp_path, cut, 3, "deepspeed", 3)
    assert (cut / "checkpoints" / "latest").read_text() == "step_2"
    assert [row["step"] for row in rows_of(cut)] == [0, 1, 2, 2, 3]
    assert run_ranks(train, 2, tmp_path, cut, 3, "deepspeed") == [0, 0]
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert rows_of(cut) == rows  # equal in every bit

    assert run_ranks(train, 1, tmp_path, tmp_path / "megatron", 1, "megatron") == [0]
    graded, first = rows[:2]
    graded_there, first_there = rows_of(tmp_path / "megatron")[:2]
    for name in ("reward", "loss", "grad_norm"):
        assert first_there[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    assert first["grad_norm"] > 0.01
    for name in ("grade/proxy", "grade/gold"):
        assert graded_there[name] == pytest.approx(graded[name])
