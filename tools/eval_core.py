"""The CORE benchmark (DCLM) of a checkpoint or of a Hugging Face folder.

    python -m tools.eval_core --load RUN_DIR --bundle BUNDLE --out DIR

The bundle is a folder with core.yaml, eval_meta_data.csv and eval_data/. Each finished task is kept
in DIR/results.jsonl and not done again when the same command is started anew; the table is in
core.md, core.csv and core.json. Under torchrun, data-parallel copies share the questions, and the
layout may be any:

    torchrun --nproc-per-node 4 -m tools.eval_core --expert-model-parallel-size 2 ...
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.evaluation.core.bundle import read_bundle
from megatron_ext.evaluation.core.core_results import Results, markdown
from megatron_ext.inference.loading_flags import (
    add_model_flags,
    check_at_least_one,
    is_first_rank,
    loading_options,
)
from megatron_ext.progress import Progress
from megatron_ext.quiet import quiet_megatron, quiet_warnings


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    check_at_least_one(options, "max_items", "max_length", "batch_tokens")
    labels = options.tasks.split(",") if options.tasks else None
    tasks = read_bundle(Path(options.bundle), labels)
    whole = len(tasks) == len(read_bundle(Path(options.bundle)))
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.evaluation.core.core_scoring import chosen_items, judge
        from megatron_ext.evaluation.log_likelihoods import from_first_rank
        from megatron_ext.evaluation.models import load

        layout, others = loading_options(options)
        # A question that cannot be asked should stop the run now, not after hours.
        questions = {task.label: chosen_items(task, options.max_items) for task in tasks}
        model = load(options.load, layout, **others)
    max_length = options.max_length or model.max_length
    if max_length > model.max_length:
        raise UserError(f"--max-length {max_length}: the model takes {model.max_length} tokens")
    settings = {**model.description, "max_items": options.max_items, "max_length": max_length}
    results = from_first_rank(lambda: Results(Path(options.out), settings))
    for number, task in enumerate(tasks, 1):
        if results.finished(task):
            continue
        with quiet_warnings(), _Shown(f"{task.label} ({number}/{len(tasks)})") as shown:
            judged = judge(
                task, questions[task.label], model, max_length, options.batch_tokens, shown.show
            )
        if is_first_rank():
            results.add(task, judged)
    if is_first_rank():
        table = results.table(tasks, whole)
        results.save(table)
        print(markdown(table), end="", flush=True)


class _Shown:
    """Progress of one task on the first rank; how many prompts it has is known only on the way."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.progress: Progress | None = None

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress is not None:
            self.progress.__exit__(*error)

    def show(self, done: int, total: int) -> None:
        if not is_first_rank():
            return
        if self.progress is None:
            self.progress = Progress(self.label, total, "prompts").__enter__()
        self.progress.update(done)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.eval_core", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="run directory or Hugging Face folder")
    add("--bundle", required=True, metavar="DIR", help="folder with core.yaml")
    add("--out", required=True, metavar="DIR", help="folder for results, made if needed")
    add("--tasks", metavar="A,B", help="labels of the tasks to do (all)")
    add("--max-items", type=int, metavar="N", help="questions a task, always the same (all)")
    add("--max-length", type=int, metavar="N", help="tokens of a prompt (the model's length)")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="of a batch (%(default)s)")
    add_model_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
