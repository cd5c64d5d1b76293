"""Run the controlled study in miniature: policies trained on three kinds of judges.

    python -m examples.alignment.study [FILE.yaml] [--seeds 1 2 3] [--output DIR]

An Expert Threshold model is pretrained and fine-tuned to answer, once. For each seed the gold
judge, a rule, labels its responses and corrupted text. One judge is trained on the labels, and
one on the gold judge's thinking and labels and then by GRPO. A policy is trained on each of them,
and one on the gold judge itself. The gold judge, and a second rule that its exploits do not fool,
grade all policies. Repeat the command to resume the study, or with more seeds to extend it.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from examples.alignment.study.plan import CHAT, JUDGES, StudyPlan, read_settings
from examples.quickstart.steps import Stopped, duration, run_steps, say, stop_on_signals
from examples.quickstart.training import find_gpus, let_import
from megatron_ext.errors import UserError, run_tool
from megatron_ext.typed_flags import flag, parse_config

DEFAULT = Path(__file__).parents[1] / "study.yaml"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Flags of the study."""

    file: str = flag(str(DEFAULT), positional=True, metavar="FILE.yaml")
    """Settings of the study. Default: examples/alignment/study.yaml."""
    seeds: tuple[int, ...] = flag((1,), metavar="SEED")
    """Seeds of the runs."""
    share_judges: bool = flag(False)
    """Train judges with the first seed only, so that intervals are over the seeds of the
    policies."""
    judges: tuple[Literal["label", "reasoning", "gold"], ...] = flag(tuple(JUDGES))
    """Judges that policies are trained on."""
    quickstart: str | None = flag(None, metavar="DIR")
    """Folder of a finished make quickstart, whose text and model are used. Default: none; they are
    made."""
    output: str | None = flag(None, metavar="DIR")
    """Folder of the study. Default: runs/study-NAME."""
    jobs: int | None = flag(None, metavar="N", at_least=1)
    """Number of steps that run at the same time. Default: one per CPU core, or 1 on GPUs."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds names a seed twice. Remove one.")
        if self.quickstart and not (Path(self.quickstart) / "metrics.jsonl").is_file():
            raise UserError(
                f"--quickstart {self.quickstart} has no metrics.jsonl. Give the folder of a "
                "finished quickstart."
            )


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
    study = StudyPlan(
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
        say("Stopped. Repeat the command to resume.")
        return 128 + stopped.number
    say((output / "report.txt").read_text().strip())
    say(f"all after {duration(time.monotonic() - start)}")
    return 0


def _parse(argv: Sequence[str] | None) -> StudyConfig:
    return parse_config(StudyConfig, argv, "python -m examples.alignment.study", __doc__)


if __name__ == "__main__":
    sys.argv[0] = "study"  # the name that errors begin with
    run_tool(main)  # type: ignore[arg-type]
