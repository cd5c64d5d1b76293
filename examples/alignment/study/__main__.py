"""The controlled study in miniature: policies against a judge of labels, one that thinks, and gold.

    python -m examples.alignment.study [FILE.yaml] [--seeds 1 2 3] [--output DIR]

An Expert Threshold model is pretrained and taught to answer, once. For each seed its responses and
spoilt text are labelled by gold, a rule; a judge is trained on the labels, another one on gold's
thinking and labels and then by GRPO; a policy is trained against each, and one against gold itself.
Gold, and a second rule that gold's exploits do not fool, grade all of them. Run again, it reuses
what is done and goes on from where it was stopped; more seeds are added.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from examples.alignment.study.plan import CHAT, JUDGES, Study, read_settings
from examples.quickstart.steps import Stopped, duration, run_steps, say, stop_on_signals
from examples.quickstart.training import find_gpus, let_import
from megatron_ext.errors import ToolParser, UserError, run_tool

DEFAULT = Path(__file__).parents[1] / "study.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    settings = read_settings(Path(options.file))
    output = Path(options.output or f"runs/study-{settings['name']}").absolute()
    output.mkdir(parents=True, exist_ok=True)
    (output / "chat.jinja").write_text(CHAT)
    let_import()
    start = time.monotonic()
    stop_on_signals()
    gpus = find_gpus()
    jobs = options.jobs or (1 if gpus else psutil.cpu_count(logical=False) or 1)
    quickstart = Path(options.quickstart).absolute() if options.quickstart else None
    study = Study(
        output, settings, ranks=min(2, gpus or jobs), on_gpus=bool(gpus), quickstart=quickstart,
        judges_of=options.seeds[0] if options.share_judges else None, judges=options.judges,
    )  # fmt: skip
    stamps = output / "steps"
    try:
        run_steps(study.shared(), stamps)
        for phase in study.phases(options.seeds):
            run_steps(phase, stamps, jobs)
        run_steps(study.report(options.seeds), stamps)
    except Stopped as stopped:
        say("stopped; the same command goes on from here")
        return 128 + stopped.number
    say((output / "report.txt").read_text().strip())
    say(f"all after {duration(time.monotonic() - start)}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(
        prog="python -m examples.alignment.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "file",
        nargs="?",
        default=DEFAULT,
        metavar="FILE.yaml",
        help="(examples/alignment/study.yaml)",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="(1)")
    add(
        "--share-judges",
        action="store_true",
        help="train judges with the first seed alone: then intervals are over policies' seeds",
    )
    add(
        "--judges",
        nargs="+",
        choices=list(JUDGES),
        default=list(JUDGES),
        metavar="JUDGE",
        help=f"of {', '.join(JUDGES)}; default: all",
    )
    add("--quickstart", metavar="DIR", help="take text and model of a finished make quickstart")
    add("--output", metavar="DIR", help="(runs/study-NAME)")
    add("--jobs", type=int, help="steps at once (one a CPU core; 1 on GPUs)")
    options = parser.parse_args(argv)
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds names one twice")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} must be at least 1")
    if options.quickstart and not (Path(options.quickstart) / "metrics.jsonl").is_file():
        raise UserError(f"--quickstart {options.quickstart} is no finished quickstart")
    return options


if __name__ == "__main__":
    sys.argv[0] = "study"  # the name that errors begin with
    run_tool(main)  # type: ignore[arg-type]
