"""Run EleutherAI's lm-evaluation-harness on checkpoints of this project, as model megatron-et.

    python -m tools.eval_harness run --model megatron-et --model_args load=RUN_DIR --tasks TASK

All flags are those of the harness. The keys of --model_args are the arguments of `MegatronLM`, such
as expert_model_parallel_size=2 under torchrun.
"""

import os
import sys
import warnings
from importlib.util import find_spec

from megatron_ext.devices import activate
from megatron_ext.errors import UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import is_first_rank
from megatron_ext.quiet import quiet_megatron


def main() -> None:
    """Run the harness with the model megatron-et registered."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "The package lm-eval is not installed. Install it with "
            "pip install 'megatron-et[evaluation]'."
        )
    if not is_first_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from lm_eval.__main__ import cli_evaluate

        import megatron_ext.evaluation.lm_eval_adapter  # noqa: F401
    with warnings.catch_warnings():  # the harness logs its own
        warnings.simplefilter("ignore")
        cli_evaluate()


if __name__ == "__main__":
    run_tool_or_ranks(main)
