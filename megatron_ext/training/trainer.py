"""Additions to Megatron's trainer, in one place and in the order in which they run.

Megatron's trainer takes no callbacks. Its functions are wrapped instead, as the table of patches
lists them.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ext import patches
from megatron_ext.optimizer import warm_momentum
from megatron_ext.training.metrics import MetricLog
from megatron_ext.training.run_progress import RunProgress
from megatron_ext.training.saving import explain_failure
from megatron_ext.training.step import RoutingStep, commit_after
from megatron_ext.training.watchdog import Watchdog

Function = Callable[..., Any]
_CLEAR_DEPTH_LOSSES = (
    "megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper.clean_metrics_in_tracker"
)


@dataclass(frozen=True)
class TrainerHooks:
    """Parts of a run that act while Megatron trains.

    Attributes:
        args: Megatron's arguments.
        progress: Progress with which the run starts.
        routing: Cutoffs and thresholds of the routers.
        log: Writer of metrics.
        watchdog: Detector of ranks that make no progress.
    """

    args: Namespace
    progress: RunProgress
    routing: RoutingStep
    log: MetricLog
    watchdog: Watchdog


def replacements(hooks: TrainerHooks) -> dict[str, Function]:
    """Return functions of Megatron's trainer with this project's additions around them.

    Args:
        hooks: Parts of the run. The first wrapper of a function is the innermost.
    """
    log, watchdog = hooks.log, hooks.watchdog
    wrappers: dict[str, list[Callable[[Function], Function]]] = {
        "train_step": [
            warm_momentum,
            lambda train_step: commit_after(train_step, hooks.routing),
            log.time_step,
            watchdog.watch,
        ],
        "training_log": [log.training_log],
        "evaluate": [log.evaluate, watchdog.watch],
        "evaluate_and_print_results": [log.evaluate_and_print_results],
        "save_checkpoint": [lambda save: explain_failure(save, hooks.args)],
    }
    targets = {f"megatron.training.training.{name}": around for name, around in wrappers.items()}
    targets[_CLEAR_DEPTH_LOSSES] = [log.record_depth_losses]
    functions = {}
    for target, around in targets.items():
        function = patches.original(target)
        for wrapper in around:
            function = wrapper(function)
        functions[target] = function
    return functions
