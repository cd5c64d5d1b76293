"""Experiment trackers of a run: TensorBoard, Weights & Biases and MLflow behind one interface.

A resumed run continues the same runs of the trackers, whose identifiers are in `trackers.json` of
the run directory, and does not send again what they already have. A tracker that fails while a
model trains does not end the training; `metrics.jsonl` has everything in any case.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.tracker_services import MLflow, RunIdentifiers, TensorBoard, WeightsAndBiases


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """Choice of trackers.

    Attributes:
        run_dir: Folder of the run, or None.
        tensorboard_dir: Folder of TensorBoard's files, or None for no TensorBoard.
        wandb_project: Project of Weights & Biases, or None for no Weights & Biases.
        wandb_name: Name of the run in Weights & Biases. Default: that of the run directory.
        wandb_entity: User or team in Weights & Biases. Default: that of the account.
        wandb_dir: Folder of the files of Weights & Biases. Default: the run directory.
        mlflow_experiment: Experiment of MLflow, or None for no MLflow.
        mlflow_uri: Address or folder of MLflow's store. Default: MLFLOW_TRACKING_URI, or mlflow/
            in the run directory.
    """

    run_dir: Path | None
    tensorboard_dir: Path | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    wandb_entity: str | None = None
    wandb_dir: Path | None = None
    mlflow_experiment: str | None = None
    mlflow_uri: str | None = None

    def check(self) -> None:
        """Check that the packages are installed and that files have a folder.

        Raises:
            UserError: The message names the flag, and the command or flag to add.
        """
        for flag, value, package in (
            ("--wandb-project", self.wandb_project, "wandb"),
            ("--mlflow-experiment", self.mlflow_experiment, "mlflow"),
        ):
            if value and find_spec(package) is None:
                raise UserError(
                    f"{flag} {value} requires the package {package}. Install it with "
                    f"pip install 'megatron-et[{package}]', or leave the flag out."
                )
        if self.wandb_project and not (self.wandb_dir or self.run_dir):
            raise UserError(
                "--wandb-project requires a folder. Add --run-dir, or --wandb-save-dir and "
                "--wandb-exp-name."
            )
        if self.wandb_project and not (self.wandb_name or self.run_dir):
            raise UserError("--wandb-project requires a name. Add --run-dir or --wandb-exp-name.")
        if self.mlflow_experiment and not self.mlflow_store:
            raise UserError(
                "--mlflow-experiment requires a store. Add --mlflow-tracking-uri or --run-dir."
            )

    @property
    def name(self) -> str | None:
        """Name of the run."""
        if self.wandb_name or self.run_dir is None:
            return self.wandb_name
        return self.run_dir.absolute().name

    @property
    def mlflow_store(self) -> str | None:
        """Address of MLflow's store, or None if there is neither an address nor a run directory."""
        uri = self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and self.run_dir is not None:
            return (self.run_dir / "mlflow").absolute().as_uri()
        return uri


class Tracker(Protocol):
    """Experiment tracker.

    Attributes:
        place: Address or folder for the start of the run, or an empty string.
    """

    place: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step by their tags."""

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Send an image, uint8 `[height, width, 3]`."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text in Markdown."""

    def close(self) -> None:
        """Send the remaining values."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, settings: TrackerSettings, configuration: Mapping[str, Any]) -> None:
        """Start or continue the runs of the trackers.

        Args:
            settings: Choice of trackers.
            configuration: Settings of the run for its page in a tracker, JSON values.

        Raises:
            UserError: A tracker does not start.
        """
        settings.check()
        self._trackers: list[tuple[str, Tracker]] = []
        self._logged: set[tuple[int, str]] = set()
        self._failed: set[str] = set()
        identifiers = RunIdentifiers(settings.run_dir)
        makers: list[tuple[str, str, Any, Callable[[], Tracker]]] = [
            (
                "TensorBoard", "--tensorboard-dir", settings.tensorboard_dir,
                lambda: TensorBoard(settings.tensorboard_dir or Path()),
            ),
            (
                "Weights & Biases", "--wandb-project", settings.wandb_project,
                lambda: WeightsAndBiases(
                    settings.wandb_project or "",
                    settings.name,
                    settings.wandb_entity,
                    settings.wandb_dir or settings.run_dir or Path(),
                    identifiers,
                    configuration,
                ),
            ),
            (
                "MLflow", "--mlflow-experiment", settings.mlflow_experiment,
                lambda: MLflow(
                    settings.mlflow_experiment or "",
                    settings.name,
                    settings.mlflow_store or "",
                    identifiers,
                    configuration,
                ),
            ),
        ]  # fmt: skip
        for name, flag, value, make in makers:
            if value:
                try:
                    tracker = make()
                except Exception as error:  # of three libraries and their network
                    raise UserError(
                        f"{name} does not start for {flag} {value}: {' '.join(str(error).split())} "
                        "Correct this, or leave the flag out."
                    ) from error
                self._trackers.append((name, tracker))
                if tracker.place:
                    console.line(f"{'Tracker':9}{name}, {tracker.place}")

    def skip(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Mark rows of metrics as sent, so that they are not sent again."""
        self._logged = {(row["step"], name) for row in rows for name in row if name != "step"}

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the values that are numbers, with the names of the metrics as tags."""
        if any((step, tag) in self._logged for tag in values):  # then all of them have been sent
            return
        numbers = {
            tag: float(value)
            for tag, value in values.items()
            if isinstance(value, int | float) and tag != "step"
        }
        if numbers:
            self._call(lambda tracker: tracker.log(step, numbers))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Send an image, uint8 `[height, width, 3]`."""
        if not self._was_sent(step):
            self._call(lambda tracker: tracker.image(step, tag, pixels))

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text in Markdown."""
        if not self._was_sent(step):
            self._call(lambda tracker: tracker.text(step, tag, text))

    def close(self) -> None:
        """Send the remaining values, and end the runs of the trackers."""
        self._call(lambda tracker: tracker.close())
        self._trackers = []

    def _was_sent(self, step: int) -> bool:
        return any(logged_step == step for logged_step, _ in self._logged)

    def _call(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:  # of three libraries and their network
                if name not in self._failed:
                    self._failed.add(name)
                    console.warn(
                        f"warning: {name} failed, and the training continues; metrics.jsonl has "
                        f"all metrics: {' '.join(str(error).split())[:500]}"
                    )
