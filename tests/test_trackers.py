"""Tests of experiment trackers: their metrics, and that a resumed run sends nothing twice."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import UserError
from megatron_ext.trackers import Trackers, TrackerSettings

PIXELS = np.zeros((8, 16, 3), np.uint8)


def train(settings: TrackerSettings, steps: range, dropped: list[dict[str, Any]]) -> None:
    """Send the metrics of steps, as a run does that has dropped later rows of metrics."""
    trackers = Trackers(settings, {"lr": 0.1, "path": ["a"]})
    trackers.skip(dropped)
    for step in steps:
        trackers.log(step, {"step": step, "loss": 1 / step, "list": [1], "none": None})
        if step % 2 == 0:
            trackers.log(step, {"step": step, "val_loss": 2 / step, "margin_0.1%": 1.0})
        trackers.image(step, "moe/expert_load", PIXELS)
        trackers.text(step, "samples", "**prompt** <x>")
    trackers.close()


def interrupted(settings: TrackerSettings) -> None:
    """Train for four steps, lose the last two, and resume from the second."""
    train(settings, range(1, 5), [])
    dropped = [{"step": 3, "loss": 1 / 3}, {"step": 4, "loss": 1 / 4}, {"step": 4, "val_loss": 0.5}]
    dropped[2]["margin_0.1%"] = 1.0
    train(settings, range(3, 7), dropped)


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(TrackerSettings(run_dir=tmp_path, tensorboard_dir=tmp_path / "tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    assert sorted(e.step for e in events.Scalars("loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(e.step for e in events.Scalars("val_loss")) == [2, 4, 6]
    assert {e.step: e.value for e in events.Scalars("loss")}[5] == pytest.approx(0.2)
    assert sorted(e.step for e in events.Images("moe/expert_load")) == [1, 2, 3, 4, 5, 6]
    assert set(events.Tags()["scalars"]) == {"loss", "val_loss", "margin_0.1%"}
    assert events.Tags()["tensors"] == ["samples/text_summary"]


def test_mlflow_continues_its_run_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra megatron-et[mlflow] is not installed")
    from mlflow.tracking import MlflowClient

    interrupted(TrackerSettings(run_dir=tmp_path, mlflow_experiment="mine"))
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("mine")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED"
    for name, steps in (("loss", [1, 2, 3, 4, 5, 6]), ("val_loss", [2, 4, 6])):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == steps
    assert client.get_metric_history(run.info.run_id, "margin_0.1_")
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 6


def wandb_records(file: Path) -> Iterator[bytes]:
    """Yield the records of an offline file of Weights & Biases, which is a log of LevelDB."""
    content, block, record = file.read_bytes(), 32768, b""
    assert content[:4] == b":W&B"
    position = 7  # after the identifier and the version
    while position + 7 <= len(content):
        if (left := block - position % block) < 7:  # no room for a header
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1: whole, 2: first part, 3: middle, 4: last part
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that offline runs in a folder have logged, in their order."""
    from wandb.proto import wandb_internal_pb2 as records

    for file in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(file):
            items = records.Record.FromString(data).history.item
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items
            }
            if row:
                yield row


def test_wandb_continues_its_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra megatron-et[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted(TrackerSettings(run_dir=tmp_path / "run", wandb_project="mine"))
    wandb.teardown()  # its process may still be writing after the end of a run
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    steps = {"loss": [1, 2, 3, 4, 5, 6], "val_loss": [2, 4, 6]}
    expected = Counter((name, step) for name in steps for step in steps[name])
    points: Counter[tuple[str, float]] = Counter()
    for row in wandb_rows(tmp_path / "run" / "wandb"):
        points.update((name, row["step"]) for name in row if name in steps)
    assert points == expected


def test_wandb_survives_the_loss_of_its_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra megatron-et[wandb] is not installed")
    from wandb.sdk.data_types._private import MEDIA_TMP

    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers(TrackerSettings(run_dir=tmp_path, wandb_project="mine"), {})
    shutil.rmtree(MEDIA_TMP.name, ignore_errors=True)  # as a cleaner of /tmp does during a long run
    for step in (1, 2):
        trackers.image(step, "moe/expert_load", PIXELS)
        trackers.text(step, "samples", "prompt é")
    trackers.close()
    media = tmp_path / "wandb"
    assert len([*media.glob("offline-run-*/files/media/images/moe/*.png")]) == 2
    pages = [*media.glob("offline-run-*/files/media/html/*.html")]
    assert [page.read_text("utf-8") for page in pages] == [
        '<meta charset="utf-8"><pre>prompt é</pre>'
    ] * 2


@pytest.mark.parametrize("flag", ["wandb_project", "mlflow_experiment"])
def test_a_missing_package_is_named_with_its_command(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ext.trackers.find_spec", lambda name: None)
    package = flag.partition("_")[0]
    with pytest.raises(UserError, match=rf"pip install 'megatron-et\[{package}\]'"):
        options: dict[str, Any] = {flag: "mine"}
        replace(TrackerSettings(run_dir=tmp_path), **options).check()
    TrackerSettings(run_dir=tmp_path, tensorboard_dir=tmp_path).check()


def test_a_tracker_without_a_folder_or_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.trackers.find_spec", lambda name: name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="--wandb-project requires a folder"):
        TrackerSettings(run_dir=None, wandb_project="mine", wandb_name="x").check()
    with pytest.raises(UserError, match="--wandb-project requires a name"):
        TrackerSettings(run_dir=None, wandb_project="mine", wandb_dir=Path("x")).check()
    with pytest.raises(UserError, match="--mlflow-experiment requires a store"):
        TrackerSettings(run_dir=None, mlflow_experiment="mine").check()


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="TensorBoard does not start for --tensorboard-dir"):
        Trackers(TrackerSettings(run_dir=tmp_path, tensorboard_dir=tmp_path / "file" / "x"), {})


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = Trackers(TrackerSettings(run_dir=None, tensorboard_dir=tmp_path), {})
    for step in (1, 2):
        trackers.image(step, "moe/expert_load", np.zeros(3))  # not an image
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert capsys.readouterr().err.count("warning: TensorBoard failed") == 1
