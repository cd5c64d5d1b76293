"""The paper's comparison of routers on real text, at the size of the machine at hand.

    python -m examples.miniature [--seeds 1 2 3] [--rows ROW ...] [--output DIR]

Trains every row with every seed on the same tokens at equal active parameters, computes the loss
of all held-out tokens, and writes table.md, results.json, differences.png and the comparison of all
runs (comparison.html, comparison.png). When the command is run again, it reuses finished runs,
resumes interrupted ones and adds further seeds or rows to results.json, whose runs may have been
made on another machine. A run that fails, for example because it diverges, leaves the others
running. Flags after `--` are passed to
pretrain_et.py in every row, for example to choose other sizes. The micro-batches of rows of expert
choice follow from their pools. With --text the models are trained on your own text.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from examples.miniature.rows import DENSE, ROWS, Row
from examples.miniature.table import earlier_results, write_table
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
    with_bases,
)
from megatron_ext.data.shards import expand_inputs
from megatron_ext.errors import ToolParser, UserError, run_tool


def plan(
    output: Path,
    corpus: Corpus,
    rows: list[Row],
    seeds: list[int],
    ranks: int,
    jobs: int,
    optimizer: Path,
    flags: list[str],
    on_gpus: bool,
) -> list[Step]:
    """Return a training for each row and seed, seed by seed."""
    steps = []
    settings = _settings(flags)
    last, total = settings.train_iters, len(rows) * len(seeds)
    for number, (seed, row) in enumerate(((seed, row) for seed in seeds for row in rows), 1):
        name, run = row.run(seed), output / row.run(seed)
        run.mkdir(parents=True, exist_ok=True)
        experts = [] if row is DENSE else ["--expert-model-parallel-size", str(ranks)]
        batch = _micro_batch(row, settings.global_batch_size, ranks)
        own = [*flags, *batch] if row.pools else [*batch, *flags]
        follow = -(-(total - number) // jobs)
        steps.append(
            training(
                name,
                f"{row.label}, seed {seed}, {last:,} steps",
                run,
                corpus,
                [*experts, *own, "--seed", str(seed)],
                [RECIPES / "miniature.yaml", optimizer, *row.recipes],
                ranks=ranks,
                on_gpus=on_gpus,
                progress=TrainingProgress(run / "metrics.jsonl", last, name, follow),
            )
        )
    return steps


def validate(row: Row, run: Path, corpus: Corpus, flags: list[str], on_gpus: bool) -> Step:
    """Return the step that measures the loss under causal and under training routing."""
    settings = _settings(flags)
    words = []
    if row.trained_as:
        pool = settings.global_batch_size * settings.seq_length // (row.pools or 1)
        words = ["--routing", "et", row.trained_as, "--pool-tokens", str(pool)]
    file = run / "validation.json"
    return Step(
        f"{run.name}-validation",
        "every held-out token",
        module(
            "tools.validation_loss", "--load", run, "--data", corpus.valid, "--out", file, *words
        ),
        run / "validation.log",
        makes=[file],
        depends=[run / "metrics.jsonl", *corpus.files],
        environment={"OMP_NUM_THREADS": "1", **device(on_gpus)},
    )


def shared_settings(optimizer: Path, flags: list[str], text: list[str]) -> dict[str, Any]:
    """Return what all runs share, for results.json."""
    digest = hashlib.sha256()
    for recipe in (RECIPES / "miniature.yaml", optimizer):
        for file in with_bases(recipe):
            digest.update(file.read_bytes())
    settings = {"optimizer": optimizer.stem, "flags": flags, "recipes": digest.hexdigest()}
    return settings | ({"text": text} if text else {})


def _micro_batch(row: Row, global_batch: int, ranks: int) -> list[str]:
    """Return the flag for one micro-batch a step, or one for each pool of the row."""
    pools = row.pools or 1
    size, rest = divmod(global_batch, pools * ranks)
    if rest:
        raise UserError(
            f"--global-batch-size {global_batch} does not make {pools} equal pools on {ranks} "
            f"ranks for row {row.name}. Choose a multiple of {pools * ranks}."
        )
    return ["--micro-batch-size", str(size)]


def _settings(flags: list[str]) -> argparse.Namespace:
    """Return `train_iters`, batch size and sequence length of the recipe and the flags."""
    parser = ToolParser(add_help=False, allow_abbrev=False)
    recipe = yaml.safe_load((RECIPES / "miniature.yaml").read_text())
    for name in ("train_iters", "global_batch_size", "seq_length"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=recipe[name])
    return parser.parse_known_args(flags)[0]


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    flags = words[cut + 1 :]
    parser = ToolParser(
        prog="python -m examples.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(ROWS)
    add = parser.add_argument
    add(
        "--output",
        default="runs/miniature",
        metavar="DIR",
        help="Folder of the runs. Default: %(default)s.",
    )
    add(
        "--rows",
        nargs="+",
        choices=names,
        default=names,
        metavar="ROW",
        help=f"Rows to train, of {', '.join(names)}. Default: all.",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="Seeds. Default: 1.")
    add(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="Optimizer. Default: %(default)s.",
    )
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Files, folders or globs to train on, as tools.preprocess_data reads them. Default: "
        "news and encyclopedia articles.",
    )
    add("--ranks", type=int, help="Ranks of each training. Default: all GPUs, or 1.")
    add(
        "--jobs",
        type=int,
        help="Trainings at a time. Default: 1 on GPUs, or one for each CPU core.",
    )
    options = parser.parse_args(words[:cut])
    for name in ("seeds", "rows"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} repeats a value. Name each once.")
    for name in ("ranks", "jobs"):
        if (count := getattr(options, name)) is not None and count < 1:
            raise UserError(f"--{name} {count} is too small. Choose at least 1.")
    output = Path(options.output).absolute()
    expand_inputs(options.text, "--text")  # refused before anything is written
    (output / "data").mkdir(parents=True, exist_ok=True)
    let_import()
    start = time.monotonic()
    stop_on_signals()
    gpus = find_gpus()
    ranks = options.ranks or gpus or 1
    on_gpus = gpus >= ranks
    cores = psutil.cpu_count(logical=False) or 1
    jobs = options.jobs or (1 if on_gpus else max(1, cores // ranks))
    rows = [ROWS[name] for name in options.rows]
    corpus = Corpus(output / "data", tuple(options.text))
    optimizer = RECIPES / "optimizers" / f"{options.optimizer}.yaml"
    settings = shared_settings(optimizer, flags, options.text)
    earlier_results(output, settings)  # refused before anything is trained
    trainings = plan(output, corpus, rows, options.seeds, ranks, jobs, optimizer, flags, on_gpus)
    try:
        run_steps(corpus.steps(output / "miniature.log"), output / "steps")
        failed = run_steps(trainings, output / "steps", jobs, keep_going=True)
        validations = [
            validate(row, output / row.run(seed), corpus, flags, on_gpus)
            for seed in options.seeds
            for row in rows
            if row.run(seed) not in failed
        ]
        run_steps(validations, output / "steps", jobs)
    except Stopped as stopped:
        say("stopped; run the same command to resume")
        return 128 + stopped.number
    os.environ["MPLBACKEND"] = "agg"
    if len(failed) < len(trainings):
        say(write_table(output, rows, options.seeds, settings, failed))
        say(f"{output / 'table.md'} and comparison.html after {duration(time.monotonic() - start)}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(trainings)} runs failed: {', '.join(failed)}. The message of "
            f"the first: {next(iter(failed.values()))}"
        )
    return 0


if __name__ == "__main__":
    sys.argv[0] = "miniature"  # the name that errors begin with
    run_tool(main)
