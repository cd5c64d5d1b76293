"""Metric rows of a run: `metrics.jsonl`, and the MoE figures in TensorBoard.

Megatron logs losses to the console and TensorBoard by itself. Its functions that do so are
wrapped here to write the same values, with ours, as one JSON object a line.
"""

import json
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
from megatron_ext.training.step import RoutingStep


class MetricLog:
    """Writes the rows of a run on the last rank, where Megatron's own writers are.

    Args:
        path: of `metrics.jsonl`, or None to write none. Rows of steps after the one that training
            resumes from are dropped: the resumed run writes them again.
        step: knows the routers' figures.
        peak_flops: of one device, for MFU.
    """

    def __init__(self, path: Path | None, step: RoutingStep, peak_flops: float | None) -> None:
        self.path, self.step, self.peak_flops = path, step, peak_flops
        self._opened = False
        self._seconds = 0.0
        self._evaluating = ("val_loss", 0)

    def time_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step` to know how long the last one took."""

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
            # loss_scale, report_memory_flag, skipped_iter, grad_norm
            skipped, grad_norm = args[2], args[3]
            figures = self._all_figures()
            if is_last_rank():
                loss = loss_dict.get("lm loss")
                row = {
                    "step": iteration,
                    "tokens": get_args().consumed_train_samples * get_args().seq_length,
                    "loss": None if loss is None else float(loss),
                    "lr": lr,
                    "grad_norm": None if grad_norm is None else float(grad_norm),
                    "skipped": bool(skipped),
                    **self._throughput(),
                }
                self._write(row | figures, iteration)
            return result

        return wrapped

    def evaluate_and_print_results(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's function of that name to know which set and step is evaluated."""

        def wrapped(prefix: str, *args: Any, **kwargs: Any) -> Any:
            # forward_step_func, data_iterator, model, iteration
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
                self._write({"step": iteration, name: float(losses["lm loss"])}, iteration)
            return result

        return wrapped

    def _throughput(self) -> dict[str, float | None]:
        args = get_args()
        sequences = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
        flops = num_floating_point_operations(args, sequences) / self._seconds / args.world_size
        return {
            "tokens_per_s": sequences * args.seq_length / self._seconds,
            "flops_per_device": flops,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
        }

    def _all_figures(self) -> dict[str, Any]:
        """Figures of all layers on the last rank, named `moe/layer_NN/...` (NN from 0)."""
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
        args = get_args()
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float)
            and (name.startswith("moe/") or name in ("tokens_per_s", "mfu", "flops_per_device"))
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
    """FLOP/s of one device: as the user said, as known for the GPU, or as measured on a CPU."""
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    if not is_cpu_device():
        name = torch.cuda.get_device_name()
        return next((flops for key, flops in _DENSE_BF16.items() if key in name), None)
    a, b = torch.randn(2, 1024, 1024)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 1024**3 / fastest


# Dense bf16 tensor-core peaks from the makers' data sheets.
_DENSE_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the rows of `path` that are wanted; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if wanted(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
