"""Pretrain an Expert Threshold language model.

    torchrun --nproc-per-node 2 pretrain_et.py --recipe examples/recipes/FILE.yaml [flags]

Megatron's `pretrain` trains the model. This file parses the command line, checks the run, and adds
the parts of this project to the trainer.
"""

import os
import signal
import sys

from megatron_ext.console import console
from megatron_ext.errors import run_on_ranks
from megatron_ext.recipes import check_flag_names

if __name__ == "__main__":  # before torch and Megatron are imported, which takes seconds
    run_on_ranks(lambda: check_flag_names(sys.argv[1:]))
    console.capture()  # their notices go to the log of the run

from megatron_ext.devices import activate

# The device must be active before Megatron is imported. A dry run uses no GPU.
activate(use_cuda=not any(word.startswith("--dry-run") for word in sys.argv))

import torch.distributed as dist  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_ext import patches  # noqa: E402
from megatron_ext.arguments import parse_args  # noqa: E402
from megatron_ext.devices.peak_flops import peak_flops  # noqa: E402
from megatron_ext.model.language_model import language_model_config  # noqa: E402
from megatron_ext.processes import stop_with_launcher  # noqa: E402
from megatron_ext.tracker_flags import open_trackers  # noqa: E402
from megatron_ext.training.checks import check_run  # noqa: E402
from megatron_ext.training.data_loading import forward_step, train_valid_test_datasets  # noqa: E402
from megatron_ext.training.launch import Launch  # noqa: E402
from megatron_ext.training.metrics import MetricLog  # noqa: E402
from megatron_ext.training.run_console import RunConsole  # noqa: E402
from megatron_ext.training.step import RoutingStep  # noqa: E402
from megatron_ext.training.trainer import TrainerHooks  # noqa: E402
from megatron_ext.training.watchdog import Watchdog  # noqa: E402


def main() -> None:
    """Train, or print the requirements of the run with `--dry-run`."""
    args, config = parse_args(sys.argv[1:])
    patches.apply("optimizer")
    if args.dry_run is not None:
        from megatron_ext.planning.devices import device_of
        from megatron_ext.planning.dry_run import dry_run

        console.release()
        if os.environ.get("RANK", "0") == "0":  # torchrun may have started several ranks
            device = device_of(args.device, args.world_size)
            dry_run(args, config, device, lambda flags: parse_args([*sys.argv[1:], *flags]))
        return
    patches.apply("checkpoints")
    stop_with_launcher(args.exit_signal, args.stall_timeout)
    launch = Launch.join(args.rank, args.world_size, args.stall_timeout)
    if args.world_size == 1 and "MASTER_ADDR" not in os.environ:  # started without torchrun
        backend = args.distributed_backend
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    start = check_run(args, config, launch)
    if start.finished:
        if launch.rank == 0:
            console.line(f"pretrain_et.py: {start.finished}")
        launch.leave()
        return
    start.progress.record_in(args)

    routing = RoutingStep()
    config.finalize_model_grads_func = routing.finalize_model_grads
    metrics_file = start.run_dir and start.run_dir / "metrics.jsonl"
    lines = RunConsole(args, config, start.progress)
    trackers = open_trackers(args, launch)
    log = MetricLog(metrics_file, routing, lines, trackers, peak_flops(args), start.record)
    watchdog = Watchdog(launch, args.stall_timeout, lambda: args.curr_iteration + 1)
    patches.apply("trainer", TrainerHooks(args, start.progress, routing, log, watchdog))
    # Schedulers warn of a time limit by SIGUSR1; Megatron saves and ends on SIGTERM.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(args.exit_signal))

    with log, lines, watchdog:
        training.pretrain(
            pretrain_cfg_container_from_args(args, language_model_config(args, config)),
            train_valid_test_datasets,
            ModelType.encoder_or_decoder,
            watchdog.progress(log.time_data(forward_step)),
            store=launch.store,
        )


if __name__ == "__main__":
    run_on_ranks(main)
