"""Pretrain an Expert Threshold language model.

    torchrun --nproc-per-node 2 pretrain_et.py --recipe examples/recipes/FILE.yaml [flags]

Megatron's `pretrain` does the work; this file parses the command line, builds the model's
configuration and ties the thresholds' end-of-step work to the trainer.
"""

import sys

from megatron_ext.devices import activate

activate()  # before anything of Megatron is imported

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from megatron_ext.arguments import parse_args  # noqa: E402
from megatron_ext.errors import run_on_ranks  # noqa: E402
from megatron_ext.model.gpt import gpt_model_config  # noqa: E402
from megatron_ext.training import resharding  # noqa: E402
from megatron_ext.training.checks import check_run  # noqa: E402
from megatron_ext.training.data import forward_step, train_valid_test_datasets  # noqa: E402
from megatron_ext.training.metrics import MetricLog, peak_flops  # noqa: E402
from megatron_ext.training.step import RoutingStep, commit_after  # noqa: E402


def main() -> None:
    args, config = parse_args(sys.argv[1:])
    resharding.install()
    run_dir = check_run(args, config)

    step = RoutingStep(config)
    config.finalize_model_grads_func = step.finalize_model_grads
    log = MetricLog(run_dir and run_dir / "metrics.jsonl", step, peak_flops(args))
    training.train_step = log.time_step(commit_after(training.train_step, step))
    training.training_log = log.training_log(training.training_log)
    training.evaluate = log.evaluate(training.evaluate)
    training.evaluate_and_print_results = log.evaluate_and_print_results(
        training.evaluate_and_print_results
    )

    training.pretrain(
        pretrain_cfg_container_from_args(args, gpt_model_config(args, config)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    run_on_ranks(main)
