"""Metrics of a run: rows of `metrics.jsonl`, and MoE metrics in TensorBoard.

Megatron logs losses to the console and TensorBoard. The functions that do so are wrapped here to
write the same values, together with those of this project, as one JSON object per line.
"""

import json
import re
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, is_last_rank
from megatron.training.training import num_floating_point_operations

from megatron_ext.devices import is_cpu_device
from megatron_ext.training.schedule import record_step
from megatron_ext.training.step import RoutingStep


class MetricLog:
    """Writer of the metrics of a run, on the last rank, like Megatron's own writers.

    Args:
        path: Path of `metrics.jsonl`, or None to write no file. Rows of steps after the one from
            which training resumes are dropped, because the resumed run writes them again.
        step: Source of the routing metrics.
        peak_flops: Peak FLOP/s of one device, for MFU, or None if unknown.
        record: Function to call once, after the first step, so that a start without training
            leaves no record.
    """

    def __init__(
        self,
        path: Path | None,
        step: RoutingStep,
        peak_flops: float | None,
        record: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.step, self.peak_flops = path, step, peak_flops
        self._record = record
        self._opened = False
        self._seconds = 0.0
        self._evaluating, self._evaluated_sets = ("val_loss", 0), 0

    def time_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step` to measure the duration of a step."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = train_step(*args, **kwargs)
            torch.cuda.synchronize()
            self._seconds = time.perf_counter() - start
            return result

        return wrapped

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
            figures = self._all_figures()
            if is_last_rank():
                loss = loss_dict.get("lm loss")
                row = {
                    "step": iteration,
                    "tokens": settings.trained_tokens,
                    "loss": None if loss is None else float(loss),
                    "lr": lr,
                    "grad_norm": None if grad_norm is None else float(grad_norm),
                    "skipped": bool(skipped),
                    **self._throughput(sequences),
                }
                self._write(row | figures, iteration)
            return result

        return wrapped

    def evaluate_and_print_results(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's function of that name to record which set and step it evaluates."""

        def wrapped(prefix: str, *args: Any, **kwargs: Any) -> Any:
            # forward_step_func, data_iterator, model, iteration
            self._evaluated_sets = 0
            self._evaluating = ("test_loss" if "test set" in prefix else "val_loss", args[3])
            return evaluate(prefix, *args, **kwargs)

        return wrapped

    def evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `evaluate` to write an evaluation row."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            losses = result[0]
            if is_last_rank() and losses and "lm loss" in losses:
                name, iteration = self._evaluating
                if get_args().multiple_validation_sets and name == "val_loss":
                    # Megatron evaluates one set after the other, in the order of the flags.
                    names = get_args().validation_set_names
                    name += f"/{names[self._evaluated_sets] if names else self._evaluated_sets}"
                    self._evaluated_sets += 1
                self._write({"step": iteration, name: float(losses["lm loss"])}, iteration)
            return result

        return wrapped

    def _throughput(self, sequences: int) -> dict[str, float | None]:
        """Return duration, size and speed of the step, which need no flags to be understood.

        Args:
            sequences: Sequences of the step on all ranks.
        """
        args = get_args()
        flops = num_floating_point_operations(args, sequences)
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

    def _all_figures(self) -> dict[str, Any]:
        """Return the metrics of all layers, named `moe/layer_NN/...` (NN from 0), on every rank."""
        layers = self.step.figures
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            stages: list[dict[int, Any]] = [
                {} for _ in range(mpu.get_pipeline_model_parallel_world_size())
            ]
            dist.all_gather_object(stages, layers, group=mpu.get_pipeline_model_parallel_group())
            layers = {number: figures for stage in stages for number, figures in stage.items()}
        return {
            f"moe/layer_{number:02d}/{name}": value
            for number, figures in sorted(layers.items())
            for name, value in figures.items()
        }

    def _write(self, row: dict[str, Any], iteration: int) -> None:
        """Write a row to TensorBoard, Weights & Biases and the file of metrics."""
        args = get_args()
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float)
            and (
                name.startswith("moe/") or name in ("tokens_per_s", "mfu", "flops_per_s_per_device")
            )
        }
        if (writer := get_tensorboard_writer()) and iteration % args.tensorboard_log_interval == 0:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if (wandb := get_wandb_writer()) and scalars:
            wandb.log(scalars, iteration)
        if self.path is None:
            return
        if not self._opened:
            self._opened = True
            keep_rows(self.path, lambda row: row["step"] <= args.iteration)
        if iteration % args.log_interval:  # lists by expert are long
            row = {name: value for name, value in row.items() if not isinstance(value, list)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def peak_flops(args: Namespace) -> float | None:
    """Return the peak FLOP/s of one device.

    It is the value of `--peak-tflops`, that of the data sheet for a known GPU, or measured on a
    CPU; None for any other GPU.
    """
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    if not is_cpu_device():
        return known_peak(torch.cuda.get_device_name())
    a, b = torch.randn(2, 1024, 1024)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 1024**3 / fastest


# Peak TFLOP/s of dense bf16 products on tensor cores, from the data sheets of the manufacturers.
_DENSE_BF16_TFLOPS = {
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L20": 119.5,
    "L40": 181.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B100": 1750.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
}


# Parts of a device's name that do not change its peak.
_WITHOUT_EFFECT = re.compile(r"nvidia|tesla|sxm\d*|\d+gb?|hbm\d\w?|3e")


def known_peak(device: str) -> float | None:
    """Return the peak FLOP/s of a GPU for dense bf16 products, or None if it is unknown.

    >>> known_peak("NVIDIA H100 NVL")
    835000000000000.0
    >>> known_peak("NVIDIA H1000")
    """
    words = re.split(r"[\s_-]+", device.lower())
    name = " ".join(word for word in words if not _WITHOUT_EFFECT.fullmatch(word))
    peaks = {key.lower(): peak for key, peak in _DENSE_BF16_TFLOPS.items()}
    peak = peaks.get(name, peaks.get(name.removesuffix(" pcie")))
    return None if peak is None else peak * 1e12


def keep_rows(path: Path, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the rows of a file that do not meet a condition, and an incomplete last line."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            if condition(json.loads(line)):
                rows.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in rows))
    temporary.replace(path)
