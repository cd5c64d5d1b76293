"""Console output of `pretrain_et.py`: the start of a run, one line for every report, and its end.

Rank 0 prints. The losses come from the last pipeline stage, and the routing metrics of each layer
from the stage of the layer. All other output of every rank is in the log.
"""

import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
)

from megatron_ext.config import ETConfig
from megatron_ext.console import console, log_name
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import report_failure
from megatron_ext.planning.dry_run.parameters import Parameters, count_parameters
from megatron_ext.report_lines import RemainingTime, clock, report_line, short, step_of
from megatron_ext.training.blends import blends
from megatron_ext.training.run_progress import RunProgress

# Shares above which a report raises an alarm.
_STARVED = 0.5  # of the guaranteed minimum of the experts, filled with tokens below the threshold
_WITHOUT_EXPERT = 0.5  # of the tokens
_WAITING = 0.2  # of the time of the steps, for data

# Statuses with which Megatron ends a run whose loss or gradient is not finite when it is repeated.
_NOT_FINITE = (EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION)


class RunConsole:
    """Console of a training run, and the context manager that prints its end.

    All ranks make the same calls, and rank 0 prints.
    """

    def __init__(self, args: Namespace, config: ETConfig, progress: RunProgress) -> None:
        """Create the console of a run.

        Args:
            args: Megatron's arguments.
            config: Configuration of the model.
            progress: Progress with which the run starts.
        """
        self._args, self._config, self._progress = args, config, progress
        self._writes = args.rank == 0
        self._begin = time.monotonic()
        self._left: RemainingTime | None = None
        self._interval = _Interval()
        self._last: dict[str, Any] = {}
        self._losses: dict[str, float] = {}
        self.seconds_waiting = 0.0

    def __enter__(self) -> "RunConsole":
        """Open the log, and print the folder and the data of the run."""
        args = self._args
        log = None
        if args.run_dir is not None:
            log = Path(args.run_dir, log_name())
            console.log_to(log)
        if not self._writes:
            return self
        name = "not kept: add --run-dir"
        if args.run_dir is not None:
            name = f"{args.run_dir}, Megatron's output in {log}"
        first_step = self._progress.iteration
        self._print("Run", name)
        self._print("Data", _data(args))
        if first_step:
            self._print(
                "Resumes", f"after step {first_step:,}, {short(self._progress.tokens)} tokens"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        """Print the result, if the training finished or was stopped by a signal or by Megatron."""
        diverged = kind is not None and getattr(error, "code", 0) in _NOT_FINITE
        if diverged:
            report_failure(
                f"the loss or a gradient of step {self._args.curr_iteration + 1:,} is not a finite "
                "number. Train with a lower --lr in a new run, or repeat the command on other "
                "devices if this step succeeded before."
            )
        if not self._writes or (kind is not None and not issubclass(kind, SystemExit)):
            return
        args, step = self._args, self._last.get("step", self._progress.iteration)
        seconds = clock(time.monotonic() - self._begin)
        total = args.train_iters or step
        if step < total and not args.skip_train:
            advice = " Run the same command again to resume." if args.save and not diverged else ""
            self._print("Stopped", f"after step {step:,} of {total:,}, {seconds}.{advice}")
        elif not args.skip_train:
            tokens = short(self._last["tokens"]) if self._last else ""
            self._print("Finished", f"{step:,} steps, {tokens} tokens, {seconds}")
        if self._losses:
            losses = (f"{name} {loss:.4f}" for name, loss in self._losses.items())
            self._print("Loss", ", ".join(losses))
        if args.run_dir is not None:
            self._print("Report", f"python -m tools.report --run-dir {args.run_dir}")

    def describe_model(self, model: list[torch.nn.Module]) -> None:
        """Print the size of the model and its layout; a collective of the pipeline stages."""
        if self._left is not None:
            return
        args, config = self._args, self._config
        self._left = RemainingTime(args.train_iters)
        self._left.finish_step(self._progress.iteration)
        parameters = Parameters.of_model(_gather_stages(count_parameters(model, args)))
        if not self._writes:
            return
        size = f"{short(parameters.total)} parameters"
        experts = ""
        if config.num_moe_experts is not None:
            rate = config.mean_experts / config.num_moe_experts
            size += f", {short(parameters.active(rate))} active per token"
            experts = f", {config.num_moe_experts} experts, {args.router_type}"
        self._print(
            "Model", f"{size}; {args.num_layers} layers of width {args.hidden_size}{experts}"
        )
        sizes = {
            "data": args.data_parallel_size,
            "tensor": args.tensor_model_parallel_size,
            "pipeline": args.pipeline_model_parallel_size,
            "context": args.context_parallel_size,
            "expert": args.expert_model_parallel_size,
        }
        layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        device = "CPU" if is_cpu_device() else torch.cuda.get_device_name()
        ranks = f"{args.world_size} rank{'s' * (args.world_size > 1)} on {device}"
        batches = get_num_microbatches()
        tokens = args.micro_batch_size * args.data_parallel_size * batches * args.seq_length
        self._print(
            "Layout",
            f"{ranks}{f': parallel {layout}' if layout else ''}; {tokens:,} tokens per step in "
            f"{batches} micro-batch{'es' * (batches > 1)}",
        )

    def finish_step(self, row: dict[str, Any], metrics: dict[str, float]) -> None:
        """Count a step, and print a line if a report is due.

        Args:
            row: Row of `metrics.jsonl`, with the loss.
            metrics: Means over the layers of the routing metrics.
        """
        if not self._writes:
            return
        args, step = self._args, row["step"]
        left = self._left
        assert left is not None, "describe_model must run before the first step"
        left.finish_step(step)
        self._last = row
        if row["loss"] is not None and not row["skipped"]:
            self._losses["training"] = row["loss"]
        self._interval.add(row, metrics, self.seconds_waiting)
        first = step == self._progress.iteration + 1
        due = first or step % args.log_interval == 0 or step == args.train_iters
        line, alarms = self._interval.report(step_of(step, args.train_iters), str(left))
        if not due:
            console.status(line)
        else:
            (console.alarm if alarms else console.line)(line)
            self._interval = _Interval()

    def evaluate(self, name: str, step: int, loss: float, final: bool) -> None:
        """Print the loss of an evaluation.

        Args:
            name: Name in `metrics.jsonl`, such as `val_loss`.
            step: Number of finished steps.
            loss: Mean loss per token in nats.
            final: Whether Megatron evaluates after the training, on further samples.
        """
        label = name.replace("val_loss", "validation").replace("test_loss", "test")
        self._losses[label] = loss
        if self._writes:
            text = f"{'final ' if final else ''}{label} loss {loss:.4f}"
            console.line(report_line([step_of(step, self._args.train_iters), text]), "bold")

    def _print(self, label: str, text: str) -> None:
        console.line(f"{label:9}{text}")


class _Interval:
    """Steps since the last report."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.skipped = self.steps = self.tokens = 0
        self.seconds = self.waiting = 0.0
        self.fan_out: list[float] = []
        self.metrics: dict[str, float] = {}
        self.load = 0.0
        self.broken = False  # a loss or a gradient that is not finite

    def add(self, row: dict[str, Any], metrics: dict[str, float], waiting: float) -> None:
        self.steps += 1
        self.tokens += row["batch_size"] * row["seq_length"]
        self.seconds += row["seconds"]
        self.waiting += waiting
        self.skipped += row["skipped"]
        if row["loss"] is not None and not row["skipped"]:
            self.losses.append(row["loss"])
            self.broken |= not math.isfinite(row["loss"])
            self.broken |= row["grad_norm"] is not None and not math.isfinite(row["grad_norm"])
        if metrics:
            self.fan_out.append(metrics["fan_out"])
            self.load = max(self.load, metrics["largest_load"])
            self.metrics = metrics

    def report(self, step: str, left: str) -> tuple[str, list[str]]:
        """Return the line of these steps, and their alarms."""
        parts = [step]
        if self.losses:
            parts.append(f"loss {sum(self.losses) / len(self.losses):.4f}")
        parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        parts.append(left)
        if self.fan_out:
            parts.append(f"fan-out {sum(self.fan_out) / len(self.fan_out):.2f}")
            parts.append(f"largest load {self.load:.1f}x")
        alarms = []
        if self.broken:
            alarms.append("loss or gradient is not a finite number")
        if self.skipped:
            alarms.append(f"{self.skipped} of {self.steps} steps skipped")
        if self.metrics.get("starvation", 0) > _STARVED:
            alarms.append(f"starvation {self.metrics['starvation']:.0%}")
        if dead := self.metrics.get("all_dead_experts", 0):
            alarms.append(f"{dead:.0f} expert{'s' * (dead > 1)} without a token")
        if (share := self.metrics.get("no_expert_share", 0)) > _WITHOUT_EXPERT:
            alarms.append(f"{share:.0%} of the tokens without an expert")
        if self.waiting > _WAITING * self.seconds:
            alarms.append(f"{self.waiting / self.seconds:.0%} of the time waiting for data")
        return report_line(parts, alarms), alarms


def _data(args: Namespace) -> str:
    """Return a description of the training data of a run."""
    if args.mock_data:
        return "random tokens (--mock-data)"
    names = blends(args)[0].prefixes
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _gather_stages(value: Any) -> list[Any]:
    """Gather the values of all pipeline stages on every rank."""
    size = mpu.get_pipeline_model_parallel_world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=mpu.get_pipeline_model_parallel_group())
    return values
