"""Evaluate a checkpoint or a Hugging Face folder on the CORE benchmark (DCLM).

    python -m tools.eval_core --load RUN_DIR --bundle BUNDLE --out DIR

The bundle is a folder with core.yaml, eval_meta_data.csv and eval_data/. The result of each
finished task is saved in DIR/results.jsonl, and the same command resumes after the finished tasks.
The table is written to core.md, core.csv and core.json. Under torchrun the data-parallel replicas
share the questions, with any layout:

    torchrun --nproc-per-node 4 -m tools.eval_core --expert-model-parallel-size 2 ...
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.evaluation.core.bundle import read_bundle
from megatron_ext.evaluation.core.core_results import CoreResults, markdown
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.model_location import model_content
from megatron_ext.progress import Progress
from megatron_ext.quiet import quiet_megatron, quiet_warnings


class EvalCoreFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    bundle: str
    out: str
    tasks: str | None
    max_items: int | None
    max_length: int | None
    batch_tokens: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, EvalCoreFlags())
    check_at_least_one(
        max_items=flags.max_items, max_length=flags.max_length, batch_tokens=flags.batch_tokens
    )
    labels = flags.tasks.split(",") if flags.tasks else None
    tasks = read_bundle(Path(flags.bundle), labels)
    whole = len(tasks) == len(read_bundle(Path(flags.bundle)))
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.evaluation.core.core_scoring import chosen_items, judge
        from megatron_ext.evaluation.log_likelihoods import from_first_rank
        from megatron_ext.evaluation.models import load

        layout, others = flags.load_model_options()
        # A malformed question should stop the run now, not after hours.
        questions = {task.label: chosen_items(task, flags.max_items) for task in tasks}
        model = load(flags.load, layout, **others)
    max_length = flags.max_length or model.max_length
    if max_length > model.max_length:
        raise UserError(
            f"--max-length {max_length} is above the model's context length of {model.max_length} "
            "tokens. Set it to at most that."
        )
    settings = {
        **model.description,
        # The folder may have other weights by now, such as the newest export of a run.
        "weights": model_content(Path(flags.load)),
        "max_items": flags.max_items,
        "max_length": max_length,
    }
    results = from_first_rank(lambda: CoreResults(Path(flags.out), settings))
    for number, task in enumerate(tasks, 1):
        if results.finished(task):
            continue
        with quiet_warnings(), _Shown(f"{task.label} ({number}/{len(tasks)})") as progress:
            judged = judge(
                task, questions[task.label], model, max_length, flags.batch_tokens, progress.show
            )
        if is_first_rank():
            results.add(task, judged)
    if is_first_rank():
        table = results.table(tasks, whole)
        results.save(table)
        print(markdown(table), end="", flush=True)


class _Shown:
    """Progress of one task on the first rank; the number of prompts is known only while it runs."""

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
    # fmt: off
    add("--load", required=True, metavar="DIR", help="Run directory or Hugging Face folder.")
    add("--bundle", required=True, metavar="DIR",
        help="Folder of the benchmark, which contains core.yaml.")
    add("--out", required=True, metavar="DIR",
        help="Folder for the results. It is created if it does not exist.")
    add("--tasks", metavar="A,B",
        help="Labels of the tasks to evaluate, separated by commas. Default: all.")
    add("--max-items", type=int, metavar="N",
        help="Number of questions per task, the same ones in every run. Default: all.")
    add("--max-length", type=int, metavar="N",
        help="Length to which prompts are cropped, in tokens. Default: the context length of the "
             "model.")
    add("--batch-tokens", type=int, default=4096, metavar="N",
        help="Number of tokens in a batch, padding included. Default: %(default)s.")
    # fmt: on
    add_loading_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
