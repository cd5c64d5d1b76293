"""Everything once, on one machine: real text, a tokenizer, indexed data, a small Expert Threshold
model trained on two ranks that share its experts out, its validation loss against two models that
count, a continued text, and a report.

    python -m examples.quickstart            # or: make quickstart

Leaves in the output directory: checkpoints/, tensorboard/, metrics.jsonl, run.json, report.html,
report.png and logs. Run again, it reuses what is done and goes on from where it was stopped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import yaml

from examples.quickstart.steps import Step, Stopped, duration, run_steps, say, stop_on_signals
from megatron_ext.errors import ToolParser, UserError, run_tool

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
VOCABULARY = 2048
# Of the documents. Its 90,000 or so tokens fix the loss to about 0.01 nats.
VALID_FRACTION = 0.03
PROMPT = "The government said on Tuesday that"
_PROGRESS_S = 15.0


class TrainingProgress:
    """Says how far training is, from `metrics.jsonl` as it grows.

    Args:
        last_step: at which training ends.
    """

    def __init__(self, metrics: Path, last_step: int) -> None:
        self.metrics, self.last_step = metrics, last_step
        self.origin: tuple[int, float] | None = None  # the first step seen, and when
        self.told = 0, 0.0  # the last step said, and when

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.told[1] < _PROGRESS_S or (row := self._last_row()) is None:
            return
        step = int(row["step"])
        if self.origin is None or step <= self.origin[0]:
            self.origin = step, now
            return
        if step == self.told[0]:
            return
        self.told = step, now
        left = (self.last_step - step) * (now - self.origin[1]) / (step - self.origin[0])
        say(
            f"      step {step:,} of {self.last_step:,}: loss {row['loss']:.2f}, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {duration(left)} left"
        )

    def _last_row(self) -> dict[str, float] | None:
        """The newest training row."""
        if not self.metrics.is_file():
            return None
        with self.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:  # the cut beginning
                return None
            if row.get("loss") is not None:
                return row
        return None


def plan(run: Path, ranks: int, train_iters: int | None, on_gpus: bool) -> list[Step]:
    """The steps in order."""
    data, log = run / "data", run / "quickstart.log"
    text, tokenizer, prefix = data / "text.jsonl", data / "tokenizer.model", data / "news"
    train, valid = (f"{prefix}_{split}_text_document" for split in ("train", "valid"))
    streams, metrics = [Path(f"{s}.bin") for s in (train, valid)], run / "metrics.jsonl"
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    steps = train_iters or recipe["train_iters"]
    shorter = [
        *("--train-iters", str(steps), "--et-warmup-iters", str(-(-steps // 5))),
        *("--eval-interval", str(-(-steps // 6))),
    ]
    # Neither Transformer Engine nor Apex has to be there; on the CPU these are set anyway.
    plain = ["--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
    plain += ["--no-persist-layer-norm", "--no-masked-softmax-fusion"]
    device = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    network = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}

    def source(name: str) -> list[Path]:
        return [Path(__file__).with_name(f"{name}.py")]

    def module(name: str, *arguments: str | Path) -> list[str]:
        return ["-m", name, *map(str, arguments)]

    return [
        Step(
            "text",
            "cleaning news and encyclopedia articles",
            module("examples.quickstart.prepare_text", "--output", text, "--wikipedia"),
            log,
            makes=[text],
            depends=source("prepare_text"),
        ),
        Step(
            "tokenizer",
            f"learning {VOCABULARY:,} entries",
            module(
                "tools.train_tokenizer", "--input", text, "--output", tokenizer, "--overwrite",
                "--vocab-size", str(VOCABULARY),
            ),
            log,
            makes=[tokenizer],
            depends=[text],
        ),
        Step(
            "data",
            "indexing the tokens for training and validation",
            module(
                "tools.preprocess_data", "--input", text, "--tokenizer-model", tokenizer,
                "--output-prefix", prefix, "--valid-fraction", str(VALID_FRACTION), "--overwrite",
            ),
            log,
            makes=streams,
            depends=[text, tokenizer],
        ),
        Step(
            "training",
            f"{steps:,} steps on {ranks} {'GPU' if on_gpus else 'CPU'} rank"
            + ("s" if ranks > 1 else ""),
            [
                *module("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
                *("--nproc-per-node", str(ranks), str(ROOT / "pretrain_et.py")),
                *("--recipe", str(RECIPES / "quickstart.yaml"), "--run-dir", str(run)),
                *("--tokenizer-type", "SentencePieceTokenizer"),
                *("--tokenizer-model", str(tokenizer)),
                *("--train-data-path", train, "--valid-data-path", valid),
                *("--expert-model-parallel-size", str(ranks), *plain),
                *(shorter if train_iters else ()),
            ],
            run / "train.log",
            makes=[run / "checkpoints", metrics],
            depends=[*streams, tokenizer, RECIPES / "quickstart.yaml", RECIPES / "base.yaml"],
            resumes=[
                run / name for name in ("checkpoints", "tensorboard", "metrics.jsonl", "run.json")
            ],
            environment={"OMP_NUM_THREADS": "1", **network, **device},
            watch=TrainingProgress(metrics, steps),
        ),
        Step(
            "validation",
            "every validation token, predicted by the model and by counting",
            module(
                "examples.quickstart.validate", "--run-dir", run,
                "--train-data", train, "--valid-data", valid,
            ),
            log,
            makes=[run / "validation.json", run / "text.txt"],
            # Seconds are in the metrics: another training has others, be its losses the same.
            depends=[metrics, *streams, *source("validate")],
            environment=device,
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
            environment=device,
        ),
        Step(
            "report",
            "drawing",
            module("tools.report", "--run-dir", run),
            log,
            makes=[run / "report.html", run / "report.png"],
            depends=[metrics, run / "validation.json", run / "sample.json"],
            environment=device,
        ),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(
        prog="python -m examples.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="runs/quickstart", metavar="DIR", help="default: %(default)s")
    add("--ranks", type=int, choices=(1, 2), help="default: 2, or 1 where there is one GPU")
    add("--train-iters", type=int, metavar="N", help="optimizer steps; default: the recipe's")
    options = parser.parse_args(argv)
    if options.train_iters is not None and options.train_iters < 1:
        raise UserError(f"--train-iters {options.train_iters} must be at least 1")
    run = Path(options.output).absolute()
    stamps = run / "data" / "steps"
    if (run / "checkpoints").exists() and not stamps.exists():
        raise UserError(f"--output {run} holds another run's checkpoints: choose another folder")
    (run / "data").mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    start = time.monotonic()
    stop_on_signals()
    try:
        gpus = _gpus()
        ranks = options.ranks or (1 if gpus == 1 else 2)
        steps = plan(run, ranks, options.train_iters, on_gpus=gpus >= ranks)
        run_steps(steps, stamps)
    except Stopped as stopped:
        say("stopped; the same command goes on from here")
        return 128 + stopped.number
    sample = json.loads((run / "sample.json").read_text())
    say(f"\n{sample['prompt']}{sample['text']}\n")
    say(f"{run / 'report.html'} after {duration(time.monotonic() - start)}")
    from tools.report import summary  # imports matplotlib

    say(summary(json.loads((run / "validation.json").read_text())))
    return 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.argv[0] = "quickstart"  # the name that errors begin with
    run_tool(main)
