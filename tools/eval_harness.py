"""EleutherAI's lm-evaluation-harness with checkpoints of this project as the model megatron-et.

    python -m tools.eval_harness run --model megatron-et --model_args load=RUN_DIR --tasks TASK

Everything else is the harness's own command line. Model arguments are those of `MegatronLM`: the
layout under torchrun, for one, as expert_model_parallel_size=2.
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
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'megatron-et[evaluation]'")
    if not is_first_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from lm_eval.__main__ import cli_evaluate

        import megatron_ext.evaluation.lm_eval_adapter  # noqa: F401
    with warnings.catch_warnings():  # the harness has its own by logging
        warnings.simplefilter("ignore")
        cli_evaluate()


if __name__ == "__main__":
    run_tool_or_ranks(main)
