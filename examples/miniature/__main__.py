"""The paper's comparison of routers on real text, at the size of the machine at hand.

    python -m examples.miniature [--seeds 1 2 3] [--rows ROW ...] [--output DIR]

Trains every row with every seed on the same tokens at equal active parameters, then writes
table.md, results.json and the comparison of all runs (comparison.html, comparison.png). Run again,
it reuses what is done and goes on from where it was stopped; more seeds or rows are added. Flags
after `--` go to pretrain_et.py in every row: other sizes, another optimizer. The micro-batches of
rows of expert choice follow from their pools.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import yaml

from examples.miniature.rows import DENSE, ROWS, Row
from examples.miniature.table import write_table
from examples.quickstart.corpus import Corpus
from examples.quickstart.steps import Step, Stopped, duration, run_steps, say, stop_on_signals
from examples.quickstart.training import RECIPES, TrainingProgress, find_gpus, let_import, training
from megatron_ext.errors import ToolParser, UserError, run_tool


def plan(
    output: Path, rows: list[Row], seeds: list[int], ranks: int, flags: list[str], on_gpus: bool
) -> list[Step]:
    """The corpus, and a training for each row and seed; all rows of a seed before the next."""
    corpus = Corpus(output / "data")
    steps = corpus.steps(output / "miniature.log")
    total = len(rows) * len(seeds)
    settings = _settings(flags)
    last = settings.train_iters
    for number, (seed, row) in enumerate(((seed, row) for seed in seeds for row in rows), 1):
        run = output / row.run(seed)
        run.mkdir(parents=True, exist_ok=True)
        own = ["--expert-model-parallel-size", str(ranks)] if row is not DENSE else []
        pools = []
        if row.pools:
            batch, rest = divmod(settings.global_batch_size, row.pools * ranks)
            if rest:
                raise UserError(
                    f"--global-batch-size {settings.global_batch_size} does not make {row.pools} "
                    f"equal pools on {ranks} ranks for row {row.name}: choose a multiple of "
                    f"{row.pools * ranks}"
                )
            pools = ["--micro-batch-size", str(batch)]
        steps.append(
            training(
                row.run(seed),
                f"{row.label}, seed {seed}, {last:,} steps",
                run,
                corpus,
                [*own, *flags, *pools, "--seed", str(seed)],
                [RECIPES / "miniature.yaml", *row.recipes],
                ranks=ranks,
                on_gpus=on_gpus,
                progress=TrainingProgress(run / "metrics.jsonl", last, total - number),
            )
        )
    return steps


def _settings(flags: list[str]) -> argparse.Namespace:
    """What the recipe and flags say of `train_iters` and `global_batch_size`."""
    parser = ToolParser(add_help=False, allow_abbrev=False)
    recipe = yaml.safe_load((RECIPES / "miniature.yaml").read_text())
    for name in ("train_iters", "global_batch_size"):
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
    add("--output", default="runs/miniature", metavar="DIR", help="default: %(default)s")
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {names}")
    add("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="default: 1")
    add("--ranks", type=int, help="default: 2, or 1 where there is one GPU")
    options = parser.parse_args(words[:cut])
    for name in ("seeds", "rows"):
        given = getattr(options, name)
        if len(set(given)) < len(given):
            raise UserError(f"--{name} names one twice")
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks} must be at least 1")
    output = Path(options.output).absolute()
    (output / "data").mkdir(parents=True, exist_ok=True)
    let_import()
    start = time.monotonic()
    stop_on_signals()
    gpus = find_gpus()
    ranks = options.ranks or (1 if gpus == 1 else 2)
    rows = [ROWS[name] for name in options.rows]
    steps = plan(output, rows, options.seeds, ranks, flags, on_gpus=gpus >= ranks)
    try:
        run_steps(steps, output / "data" / "steps")
    except Stopped as stopped:
        say("stopped; the same command goes on from here")
        return 128 + stopped.number
    os.environ["MPLBACKEND"] = "agg"
    say(write_table(output, rows, options.seeds))
    say(f"{output / 'table.md'} and comparison.html after {duration(time.monotonic() - start)}")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "miniature"  # the name that errors begin with
    run_tool(main)
