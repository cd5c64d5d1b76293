"""Pretrain an Expert Threshold language model.

    torchrun --nproc-per-node 2 pretrain_et.py --recipe examples/recipes/FILE.yaml [flags]

Megatron's `pretrain` does the work; this file parses the command line, builds the model's
configuration and ties the thresholds' end-of-step work to the trainer.
"""

import os
import signal
import sys

from megatron_ext.devices import activate

# Before anything of Megatron is imported. A dry run needs no GPU, and makes nothing on one.
activate(use_cuda=not any(word.startswith("--dry-run") for word in sys.argv))

import torch.distributed as dist  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_ext.arguments import parse_args  # noqa: E402
from megatron_ext.errors import run_on_ranks  # noqa: E402
from megatron_ext.model.gpt import gpt_model_config  # noqa: E402
from megatron_ext.optimizer import warm_momentum  # noqa: E402
from megatron_ext.processes import stop_with_launcher  # noqa: E402
from megatron_ext.training import resharding, schedule  # noqa: E402
from megatron_ext.training.checks import check_run  # noqa: E402
from megatron_ext.training.data_loading import forward_step, train_valid_test_datasets  # noqa: E402
from megatron_ext.training.launch import Launch  # noqa: E402
from megatron_ext.training.metrics import MetricLog, peak_flops  # noqa: E402
from megatron_ext.training.saving import explain_failure, install_integrity  # noqa: E402
from megatron_ext.training.step import RoutingStep, commit_after  # noqa: E402
from megatron_ext.training.watchdog import Watchdog  # noqa: E402


def main() -> None:
    args, config = parse_args(sys.argv[1:])
    if args.dry_run is not None:
        from megatron_ext.planning.dry_run import dry_run

        if os.environ.get("RANK", "0") == "0":  # torchrun may have started more
            dry_run(args, config)
        return
    resharding.install()
    stop_with_launcher(args.exit_signal, args.stall_timeout)
    launch = Launch.join(args.rank, args.world_size, args.stall_timeout)
    if args.world_size == 1 and "MASTER_ADDR" not in os.environ:  # started without torchrun
        backend = args.distributed_backend
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    start = check_run(args, config, launch)
    if start.finished:
        if launch.rank == 0:
            print(f"pretrain_et.py: {start.finished}", flush=True)
        launch.leave()
        return
    schedule.install(args, start.progress)

    step = RoutingStep()
    config.finalize_model_grads_func = step.finalize_model_grads
    watchdog = Watchdog(launch, args.stall_timeout, lambda: args.curr_iteration + 1)
    rows = start.run_dir and start.run_dir / "metrics.jsonl"
    log = MetricLog(rows, step, peak_flops(args), start.record)
    train_step = commit_after(warm_momentum(training.train_step), step)
    training.train_step = watchdog.watch(log.time_step(train_step))
    training.training_log = log.training_log(training.training_log)
    training.evaluate = watchdog.watch(log.evaluate(training.evaluate))
    training.evaluate_and_print_results = log.evaluate_and_print_results(
        training.evaluate_and_print_results
    )
    training.save_checkpoint = explain_failure(training.save_checkpoint, args)
    install_integrity()
    # Schedulers warn of a time limit by SIGUSR1; Megatron saves and ends on SIGTERM.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(args.exit_signal))

    training.pretrain(
        pretrain_cfg_container_from_args(args, gpt_model_config(args, config)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        watchdog.progress(forward_step),
        store=launch.store,
    )


if __name__ == "__main__":
    run_on_ranks(main)
