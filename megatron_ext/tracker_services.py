"""TensorBoard, Weights & Biases and MLflow, each as a tracker of `megatron_ext.trackers`."""

import html
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

_LONGEST_PARAMETER = 500  # characters, of MLflow
_NOT_IN_MLFLOW = re.compile(r"[^\w. /:-]")  # characters that its names cannot have


class TensorBoard:
    """Files that TensorBoard reads."""

    place = ""

    def __init__(self, folder: Path) -> None:
        """Open a new file of events in a folder."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder))  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()  # a killed run has written every row of metrics.jsonl here too

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Write an image."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text."""
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Run of Weights & Biases, which stays in its folder with WANDB_MODE=offline.

    The step is a value of each row and the axis of all charts, because the step counter of
    Weights & Biases cannot return to the checkpoint from which a run resumes. Images and texts are
    passed as files, which `log` copies. Data, in contrast, go through one temporary folder of the
    whole process, which a cleaner of /tmp deletes during a long run.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        entity: str | None,
        folder: Path,
        identifiers: "RunIdentifiers",
        configuration: Mapping[str, Any],
    ) -> None:
        """Start or continue the run; see `TrackerSettings` for the arguments."""
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        identifier = identifiers.read("wandb") or uuid.uuid4().hex[:12]
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            name=name,
            dir=os.fspath(folder),
            id=identifier,
            resume="allow",
            config=dict(configuration),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),  # train.log has it
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or f"{folder / 'wandb'} (offline, for wandb sync)"
        identifiers.write("wandb", identifier)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step."""
        self._run.log({"step": step, **values})

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Send an image."""
        from PIL import Image

        with TemporaryDirectory() as folder:
            file = Path(folder, "image.png")
            Image.fromarray(pixels).save(file)
            self._run.log({"step": step, tag: self._wandb.Image(os.fspath(file))})

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text."""
        with TemporaryDirectory() as folder:
            file = Path(folder, "text.html")
            file.write_text(f'<meta charset="utf-8"><pre>{html.escape(text)}</pre>', "utf-8")
            self._run.log({"step": step, tag: self._wandb.Html(os.fspath(file), inject=False)})

    def close(self) -> None:
        """Send the remaining values."""
        self._run.finish()


class MLflow:
    """Run of MLflow, in a folder or on a server."""

    def __init__(
        self,
        experiment: str,
        name: str | None,
        uri: str,
        identifiers: "RunIdentifiers",
        configuration: Mapping[str, Any],
    ) -> None:
        """Start or continue the run; see `TrackerSettings` for the arguments."""
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.tracking import MlflowClient

        # A server may be slow: its metrics are sent by a thread.
        self._synchronous = not uri.startswith("http")
        self._client: Any = MlflowClient(tracking_uri=uri)
        self.place = uri
        self._mlflow: Any = mlflow
        self._id = identifiers.read("mlflow")
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            return
        existing = self._client.get_experiment_by_name(experiment)
        place = existing.experiment_id if existing else self._client.create_experiment(experiment)
        self._id = self._client.create_run(place, run_name=name).info.run_id
        for key, value in configuration.items():
            self._client.log_param(self._id, key, str(value)[:_LONGEST_PARAMETER])
        identifiers.write("mlflow", self._id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_NOT_IN_MLFLOW.sub("_", tag), value, now, step) for tag, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics, synchronous=self._synchronous)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Send an image."""
        from PIL import Image

        self._client.log_image(self._id, Image.fromarray(pixels), key=tag, step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text as an artifact."""
        self._client.log_text(self._id, text, f"{tag}/step_{step:06d}.md")

    def close(self) -> None:
        """Send the remaining values."""
        if not self._synchronous:
            self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id)


class RunIdentifiers:
    """Identifiers of the trackers' runs, in `trackers.json` of the run directory."""

    def __init__(self, run_dir: Path | None) -> None:
        self._file = run_dir and run_dir / "trackers.json"

    def read(self, tracker: str) -> str | None:
        """Return the identifier of a tracker's run, or None before its first start."""
        return self._all().get(tracker)

    def write(self, tracker: str, identifier: str) -> None:
        """Store the identifier of a tracker's run."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_name(self._file.name + ".tmp")
            temporary.write_text(json.dumps(self._all() | {tracker: identifier}) + "\n")
            temporary.replace(self._file)

    def _all(self) -> dict[str, str]:
        if self._file is not None:
            with suppress(FileNotFoundError):
                identifiers: dict[str, str] = json.loads(self._file.read_text())
                return identifiers
        return {}
