"""Runs of pretraining and of et-align send to real offline trackers what metrics.jsonl has."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alignment.records import Message, Prompt, Response
from tests.alignment.chat_model import make_model, write_rows
from tests.distributed import ROOT
from tests.documented_metrics import undocumented
from tests.megatron import TINY
from tests.test_trackers import wandb_rows
from tests.warm import warm_python

# The metrics of supervised training on the page of metrics.
SUPERVISED = {
    *("loss", "lr", "seconds", "grad_norm", "tokens", "trained_tokens", "epoch"),
    "validation/log_prob",
}
TRACKERS = ["--wandb-project", "mine", "--mlflow-experiment", "mine"]


@pytest.fixture(autouse=True)
def allow_file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of MLflow in this process read a folder, as that of the run does."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def run(words: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """Run a command with both trackers and return the rows of its metrics."""
    pytest.importorskip("wandb", reason="the extra megatron-et[wandb] is not installed")
    pytest.importorskip("mlflow", reason="the extra megatron-et[mlflow] is not installed")
    done = subprocess.run(
        [warm_python(), *words, "--run-dir", str(run_dir), *TRACKERS],
        cwd=ROOT,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_trackers(rows: list[dict[str, Any]], run_dir: Path, tag: str) -> None:
    """Compare the values of one metric in both trackers with those of metrics.jsonl."""
    from mlflow.tracking import MlflowClient

    expected = {row["step"]: row[tag] for row in rows if tag in row}
    assert len(expected) >= 3
    in_wandb = [(row["step"], row[tag]) for row in wandb_rows(run_dir / "wandb") if tag in row]
    assert in_wandb == list(expected.items())
    client = MlflowClient(tracking_uri=(run_dir / "mlflow").as_uri())
    identifier = json.loads((run_dir / "trackers.json").read_text())["mlflow"]
    history = client.get_metric_history(identifier, tag)
    assert {point.step: point.value for point in history} == expected
    assert client.get_run(identifier).info.status == "FINISHED"


@pytest.mark.slow
def test_pretraining_sends_its_metrics_and_pictures(tmp_path: Path) -> None:
    rows = run(["pretrain_et.py", *TINY], tmp_path)
    check_trackers(rows, tmp_path, "loss")
    tag = "moe/expert_load/path"
    pictures = [row[tag] for row in wandb_rows(tmp_path / "wandb") if tag in row]
    assert len(pictures) == 6
    for path in pictures:
        [file] = tmp_path.glob(f"wandb/offline-run-*/files/{path}")
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_fine_tuning_sends_the_metrics_of_the_page(tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=128)
    prompts = [Prompt(f"p{n}", (Message("user", f"count to {n}"),)) for n in range(8)]
    rows = [Response(prompt.id, prompt, "one two three") for prompt in prompts]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        *("-m", "alignment", "train-sft", "--model", str(tmp_path / "model")),
        *("--input", str(data), "--validation-input", str(data), "--epochs", "2"),
        *("--batch-size", "4", "--seq-length", "64", "--eval-interval", "2"),
    ]
    run_dir = tmp_path / "run"
    metrics = run(words, run_dir)
    assert {name for row in metrics for name in row} == {"step", *SUPERVISED}
    assert undocumented(metrics) == set()
    for tag in SUPERVISED:
        check_trackers(metrics, run_dir, tag)
