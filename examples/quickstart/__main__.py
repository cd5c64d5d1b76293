"""Run the whole procedure of pretraining once, on one machine.

The steps are real text, a tokenizer, indexed data, a small Expert Threshold model trained on two
ranks with expert parallelism, its validation loss next to those of a unigram and a bigram model, a
continued text, and a report.

    python -m examples.quickstart            # or: make quickstart

The output folder has checkpoints/, tensorboard/, metrics.jsonl, run.json, report.html, report.png
and logs. When the command is run again, it reuses finished steps and resumes the interrupted one.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import yaml

from examples.quickstart.corpus import Corpus
from examples.quickstart.steps import (
    Step,
    Stopped,
    duration,
    module,
    run_steps,
    say,
    stop_on_signals,
)
from examples.quickstart.training import (
    RECIPES,
    TrainingProgress,
    device,
    find_gpus,
    let_import,
    training,
)
from megatron_ext.errors import ToolParser, UserError, run_tool

PROMPT = "The government said on Tuesday that"


def plan(run: Path, ranks: int, train_iters: int | None, on_gpus: bool) -> list[Step]:
    """Return the steps in order."""
    corpus, log, metrics = Corpus(run / "data"), run / "quickstart.log", run / "metrics.jsonl"
    recipe = RECIPES / "quickstart.yaml"
    steps = train_iters or yaml.safe_load(recipe.read_text())["train_iters"]
    flags = ["--expert-model-parallel-size", str(ranks)]
    if train_iters:
        flags += ["--train-iters", str(steps), "--et-warmup-iters", str(-(-steps // 5))]
        flags += ["--eval-interval", str(-(-steps // 6))]
    environment = device(on_gpus)
    return [
        *corpus.steps(log),
        training(
            "training", f"{steps:,} steps", run, corpus, flags, [recipe],
            ranks=ranks, on_gpus=on_gpus, progress=TrainingProgress(metrics, steps),
        ),
        Step(
            "validation",
            "every validation token, predicted by the model and by n-grams",
            module(
                "examples.quickstart.validate", "--run-dir", run,
                "--train-data", corpus.train, "--valid-data", corpus.valid,
            ),
            log,
            makes=[run / "validation.json", run / "text.txt"],
            # Metrics contain seconds, which differ between trainings with equal losses.
            depends=[metrics, *corpus.files[:2], Path(__file__).with_name("validate.py")],
            environment=environment,
        ),
        Step(
            "sample",
            f"continuing “{PROMPT} …”",
            module(
                "tools.generate", "--load", run, "--prompt", PROMPT, "--max-new-tokens", "120",
                "--temperature", "0.7", "--json",
            ),
            log,
            makes=[run / "sample.json"],
            depends=[metrics],
            output=run / "sample.json",
            environment=environment,
        ),
        Step(
            "report",
            "drawing",
            module("tools.report", "--run-dir", run),
            log,
            makes=[run / "report.html", run / "report.png"],
            depends=[metrics, run / "validation.json", run / "sample.json"],
            environment=environment,
        ),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(
        prog="python -m examples.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--output",
        default="runs/quickstart",
        metavar="DIR",
        help="Folder of the run. Default: %(default)s.",
    )
    add(
        "--ranks",
        type=int,
        choices=(1, 2),
        help="Number of ranks. Default: 2, or 1 on a machine with one GPU.",
    )
    add(
        "--train-iters",
        type=int,
        metavar="N",
        help="Number of optimizer steps. Default: that of the recipe.",
    )
    options = parser.parse_args(argv)
    if options.train_iters is not None and options.train_iters < 1:
        raise UserError(f"--train-iters {options.train_iters} is too small. Choose at least 1.")
    run = Path(options.output).absolute()
    stamps = run / "data" / "steps"
    if (run / "checkpoints").exists() and not stamps.exists():
        raise UserError(f"--output {run} has another run's checkpoints. Choose another folder.")
    (run / "data").mkdir(parents=True, exist_ok=True)
    let_import()
    start = time.monotonic()
    stop_on_signals()
    try:
        gpus = find_gpus()
        ranks = options.ranks or (1 if gpus == 1 else 2)
        steps = plan(run, ranks, options.train_iters, on_gpus=gpus >= ranks)
        run_steps(steps, stamps)
    except Stopped as stopped:
        say("stopped; run the same command to resume")
        return 128 + stopped.number
    sample = json.loads((run / "sample.json").read_text())
    say(f"\n{sample['prompt']}{sample['text']}\n")
    say(f"{run / 'report.html'} after {duration(time.monotonic() - start)}")
    from megatron_ext.reports.run_metrics import summary

    say(summary(json.loads((run / "validation.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.argv[0] = "quickstart"  # the name that errors begin with
    run_tool(main)
