"""Metrics of a run: rows of `metrics.jsonl`, experiment trackers and lines of the console.

Megatron's functions that log losses are wrapped here to write the same values, together with those
of this project, as one JSON object per line, and to send them to the trackers.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import get_args, global_vars, is_last_rank

from megatron_ext.flops import training_flops
from megatron_ext.json_numbers import dump_json
from megatron_ext.trackers import Trackers
from megatron_ext.training.layer_summary import load_picture, summarize_layers
from megatron_ext.training.run_console import RunConsole
from megatron_ext.training.run_progress import record_step
from megatron_ext.training.step import RoutingStep


class MetricLog:
    """Writer of the metrics of a run, on the last rank, like Megatron's own writers.

    Args:
        path: Path of `metrics.jsonl`, or None to write no file. Rows of steps after the one from
            which training resumes are dropped, because the resumed run writes them again.
        step: Source of the routing metrics.
        console: Lines that the run prints.
        trackers: Experiment trackers on the last rank, None on the others.
        peak_flops: Peak FLOP/s of one device, for MFU, or None if unknown.
        record: Function to call once, after the first step, so that a start without training
            leaves no record.
    """

    def __init__(
        self,
        path: Path | None,
        step: RoutingStep,
        console: RunConsole,
        trackers: Trackers | None,
        peak_flops: float | None,
        record: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.step, self.peak_flops = path, step, peak_flops
        self.console, self.trackers = console, trackers
        if trackers is not None:  # Megatron tests for a writer, and forwards all it logs
            global_vars._GLOBAL_TENSORBOARD_WRITER = MegatronTags(trackers)
        self._record = record
        self._opened = False
        self._seconds = 0.0
        self._depth_losses: list[float] = []
        self._evaluating, self._evaluated_sets = ("val_loss", 0), 0
        self._is_final = False

    def __enter__(self) -> "MetricLog":
        """Begin to write metrics."""
        return self

    def __exit__(self, *_: object) -> None:
        """Send what the trackers have not sent yet."""
        if self.trackers is not None:
            self.trackers.close()

    def time_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step` to measure the duration of a step."""

        def wrapped(forward_step: Any, data: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            self.console.describe_model(model)
            self.console.seconds_waiting = 0.0
            start = time.perf_counter()
            result = train_step(forward_step, data, model, *args, **kwargs)
            torch.cuda.synchronize()
            self._seconds = time.perf_counter() - start
            return result

        return wrapped

    def record_depth_losses(self, clear: Callable[[], None]) -> Callable[[], None]:
        """Wrap Megatron's function that clears the losses of multi-token prediction of a step."""

        def wrapped() -> None:
            losses = MTPLossLoggingHelper.tracker["loss_values"] / get_num_microbatches()
            self._depth_losses = losses.tolist()
            clear()

        return wrapped

    def time_data(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward step to measure how long it waits for data."""

        @wraps(forward_step)
        def wrapped(data_iterator: Any, *args: Any, **kwargs: Any) -> Any:
            iterator = None if data_iterator is None else self._timed(data_iterator)
            return forward_step(iterator, *args, **kwargs)

        return wrapped

    def _timed(self, data_iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            try:
                sample = next(data_iterator)
            except StopIteration:
                return
            self.console.seconds_waiting += time.perf_counter() - start
            yield sample

    def training_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `training_log` to write a training row."""

        def wrapped(
            loss_dict: Any, total: Any, lr: Any, iteration: int, *args: Any, **kw: Any
        ) -> Any:
            result = training_log(loss_dict, total, lr, iteration, *args, **kw)
            settings = get_args()
            sequences = (
                settings.micro_batch_size * settings.data_parallel_size * get_num_microbatches()
            )
            record_step(settings, iteration, sequences)
            if self._record is not None:
                self._record()
                self._record = None
            # loss_scale, report_memory_flag, skipped_iter, grad_norm
            skipped, grad_norm = args[2], args[3]
            loss = loss_dict.get("lm loss")
            loss, layers = self._gather_stages(None if loss is None else float(loss))
            row = {
                "step": iteration,
                "tokens": settings.trained_tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "skipped": bool(skipped),
                **{f"mtp_{depth}_loss": x for depth, x in enumerate(self._depth_losses, 1)},
                **self._throughput(sequences),
            }
            summary = summarize_layers(layers)
            if is_last_rank():
                names = {
                    f"moe/layer_{number:02d}/{name}": value
                    for number, figures in layers.items()
                    for name, value in figures.items()
                }
                self._write(row | names, iteration)
                self._track(row, summary, names if settings.log_layers else {})
                if self.trackers is not None and layers and not iteration % settings.log_interval:
                    self.trackers.image(iteration, "moe/expert_load", load_picture(layers))
            self.console.finish_step(row, summary)
            return result

        return wrapped

    def evaluate_and_print_results(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's function of that name to record which set and step it evaluates."""

        def wrapped(prefix: str, *args: Any, **kwargs: Any) -> Any:
            # forward_step_func, data_iterator, model, iteration
            self._evaluated_sets = 0
            self._evaluating = ("test_loss" if "test set" in prefix else "val_loss", args[3])
            self._is_final = prefix.endswith(" set")
            return evaluate(prefix, *args, **kwargs)

        return wrapped

    def evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `evaluate` to write an evaluation row."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            losses = result[0] or {}
            loss = float(losses["lm loss"]) if "lm loss" in losses else None
            loss, _ = self._gather_stages(loss)
            if loss is not None:
                name, iteration = self._evaluating
                if get_args().multiple_validation_sets and name == "val_loss":
                    # Megatron evaluates one set after the other, in the order of the flags.
                    names = get_args().validation_set_names
                    name += f"/{names[self._evaluated_sets] if names else self._evaluated_sets}"
                    self._evaluated_sets += 1
                if is_last_rank():
                    row = {"step": iteration, name: loss}
                    self._write(row, iteration)
                    if self.trackers is not None:
                        self.trackers.log(iteration, row)
                self.console.evaluate(name, iteration, loss, final=self._is_final)
            return result

        return wrapped

    def _throughput(self, sequences: int) -> dict[str, float | None]:
        """Return duration, size and speed of the step, in units that do not depend on the flags.

        Args:
            sequences: Sequences of the step on all ranks.
        """
        args = get_args()
        flops = training_flops(args, sequences)
        per_device = flops / self._seconds / args.world_size
        return {
            "seconds": self._seconds,
            "world_size": args.world_size,
            "batch_size": sequences,
            "seq_length": args.seq_length,
            "flops_per_token": flops / (sequences * args.seq_length),
            "tokens_per_s": sequences * args.seq_length / self._seconds,
            "flops_per_s_per_device": per_device,
            "mfu": per_device / self.peak_flops if self.peak_flops else None,
        }

    def _gather_stages(self, loss: float | None) -> tuple[float | None, dict[int, dict[str, Any]]]:
        """Gather the loss, which the last stage has, and the routing metrics of all layers.

        This is a collective of the pipeline stages.

        Args:
            loss: Loss of this step, None on other stages than the last.

        Returns:
            The loss, and the metrics by layer, counted from 0, in their order.
        """
        layers = self.step.metrics
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            stages: list[Any] = [None] * mpu.get_pipeline_model_parallel_world_size()
            group = mpu.get_pipeline_model_parallel_group()
            dist.all_gather_object(stages, (loss, layers), group=group)
            loss = stages[-1][0]
            layers = {number: row for _, part in stages for number, row in part.items()}
        return loss, dict(sorted(layers.items()))

    def _track(
        self, row: dict[str, Any], summary: dict[str, float], layers: dict[str, Any]
    ) -> None:
        """Send the metrics of a step to the trackers."""
        if self.trackers is not None and row["step"] % get_args().tensorboard_log_interval == 0:
            means = {f"moe/{name}": value for name, value in summary.items()}
            self.trackers.log(row["step"], row | means | layers)

    def _write(self, row: dict[str, Any], iteration: int) -> None:
        """Write a row to the file of metrics."""
        args = get_args()
        if self.path is None:
            return
        if not self._opened:
            self._opened = True
            dropped = keep_rows(self.path, lambda row: row["step"] <= args.iteration)
            if self.trackers is not None:
                self.trackers.skip(dropped)
        if iteration % args.log_interval:  # lists by expert are long
            row = {name: value for name, value in row.items() if not isinstance(value, list)}
        with self.path.open("a") as file:
            file.write(dump_json(row) + "\n")


class MegatronTags:
    """Substitute for Megatron's TensorBoard writer, which sends to the trackers.

    The tags begin with `megatron/`. Values that are also metrics of this project are left out, and
    so are copies of values over the number of samples.
    """

    _KNOWN = ("lm loss", "learning-rate", "grad-norm", "batch-size", "world-size")

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        """Send a number."""
        if not name.startswith(self._KNOWN) and not name.endswith(" vs samples"):
            self._trackers.log(step, {f"megatron/{name.replace(' ', '-')}": float(value)})

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that ignores other data, such as the settings, which run.json has."""
        return lambda *args, **kwargs: None


def keep_rows(path: Path, condition: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Remove the rows of a file that do not meet a condition, and an incomplete last line.

    Returns:
        The rows that were removed.
    """
    if not path.exists():
        return []
    lines, removed = [], []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            if condition(row):
                lines.append(line)
            else:
                removed.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(path)
    return removed
