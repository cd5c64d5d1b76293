"""Preprocessing: text into an indexed dataset by this project and by Megatron-LM's own tool.

Both are run as commands on the same JSON lines, with the same SentencePiece model, as many workers
and an end of document each, in turn and repeated; then their datasets are compared byte by byte.
Each is also run on a single document: what it takes to start, which is taken off.

    seconds       of the whole command, the median over turns
    start         of it, on one document
    MB/s a core   megabytes of text over seconds without the start and over workers
    MB/CPU s      over the CPU time of all processes, without the start: other work on the machine,
                  and processes that are no workers, count the same for both
    ratio         of our MB/s to theirs: median over turns, least and most

Megatron-LM's tool is not part of megatron-core's package. Clone the repository and name its file:

    git clone https://github.com/NVIDIA/Megatron-LM && git -C Megatron-LM checkout d98e8a64ddf3
    python benchmarks/preprocessing.py --megatron-tool Megatron-LM/tools/preprocess_data.py
        [--input FILE.jsonl] [--tokenizer-model FILE | --vocab-size 65536] [--workers 1 2]
        [--rounds 3] [--megabytes 64]

Without it ours is measured alone. Without --input the text begins with the quickstart's, 9 MB of
news and encyclopedia articles out of two packages that `make environment` installs. Up to
--megabytes (64) copies of them follow. Since our tool remembers words, copies alone would flatter
it: in each, words taken at random are spelt anew, as many as are new in the articles' last tenth.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from examples.quickstart import prepare_text
from megatron_ext.errors import UserError
from tools import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
US, THEM = "this project", "Megatron-LM"


@dataclass(frozen=True)
class Cost:
    """Of a command: seconds on the clock and on all its processes' CPUs."""

    wall: float
    cpu: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall - other.wall, self.cpu - other.cpu)


def articles(path: Path, megabytes: float) -> float:
    """Write the articles and their copies as JSON lines; the share of new words in the copies."""
    prepare_text.main(["--output", f"{path}", "--wikipedia"])
    texts = [json.loads(line)["text"].split(" ") for line in path.open()]
    known: set[str] = set().union(*texts[: -len(texts) // 10])
    late = [word for text in texts[-len(texts) // 10 :] for word in text]
    share = sum(word not in known for word in late) / len(late)
    choose = random.Random(0)

    def spelt(word: str) -> str:
        return "".join(choose.choices("etaoinshrdlu", k=8)) if choose.random() < share else word

    with path.open("a") as file:
        while file.tell() < megabytes * 1e6:
            for text in texts:
                file.write(json.dumps({"text": " ".join(map(spelt, text))}) + "\n")
    return share


def command(side: str, tool: str, text: Path, model: Path, workers: int, prefix: Path) -> list[str]:
    shared = ["--input", f"{text}", "--tokenizer-model", f"{model}", "--workers", f"{workers}"]
    shared += ["--output-prefix", f"{prefix}"]
    if side == US:
        ours = ["--valid-fraction", "0", "--shard-bytes", str(-(-text.stat().st_size // workers))]
        return [sys.executable, "-m", "tools.preprocess_data", *shared, *ours]
    theirs = ["--tokenizer-type", "SentencePieceTokenizer", "--append-eod"]
    return [sys.executable, tool, *shared, *theirs]


def run(arguments: list[str]) -> Cost:
    """Run a command to its end; what it cost."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if code := os.waitstatus_to_exitcode(status):
            log.seek(0)
            sys.exit(f"{arguments[1:3]} ended with {code}:\n{log.read().decode()[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime)


def dataset(side: str, prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}{'_train' if side == US else ''}_text_document.{suffix}")


def measure(
    sides: list[str], options: argparse.Namespace, text: Path, model: Path, workers: int
) -> dict[str, Any]:
    """The row of one number of workers."""
    folder = text.parent
    line = next(line for line in text.open() if line.strip())
    (folder / "one.jsonl").write_text(line)
    megabytes = sum(len(json.loads(line)["text"].encode()) for line in text.open()) / 1e6
    whole: dict[str, list[Cost]] = {side: [] for side in sides}
    start: dict[str, list[Cost]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in sides[:: 1 if turn % 2 == 0 else -1]:
            for costs, source in ((start, folder / "one.jsonl"), (whole, text)):
                prefix = folder / f"{side[0]}{turn}-{source.stem}-{workers}"
                arguments = command(side, options.megatron_tool, source, model, workers, prefix)
                costs[side].append(run(arguments))
    row: dict[str, Any] = {"workers": workers, "megabytes": round(megabytes, 3)}
    speeds: dict[str, list[float]] = {}
    for side, name in zip(sides, ("", "megatron_")):
        net = [a - b for a, b in zip(whole[side], start[side])]
        speeds[side] = [megabytes / cost.wall for cost in net]
        row |= {
            f"{name}seconds": round(median(cost.wall for cost in whole[side]), 2),
            f"{name}start_seconds": round(median(cost.wall for cost in start[side]), 2),
            f"{name}mb_per_s_per_core": round(median(speeds[side]) / workers, 3),
            f"{name}mb_per_cpu_s": round(megabytes / median(cost.cpu for cost in net), 3),
        }
    if THEM in sides:
        ratios = [ours / theirs for ours, theirs in zip(speeds[US], speeds[THEM])]
        row |= {
            "ratio": round(median(ratios), 3),
            "ratio_least": round(min(ratios), 3),
            "ratio_most": round(max(ratios), 3),
            "ratio_cpu": round(row["mb_per_cpu_s"] / row["megatron_mb_per_cpu_s"], 3),
            "same_bytes": all(
                dataset(US, folder / f"{US[0]}{turn}-{text.stem}-{workers}", suffix).read_bytes()
                == dataset(THEM, folder / f"{THEM[0]}0-{text.stem}-{workers}", suffix).read_bytes()
                for turn in range(options.rounds)
                for suffix in ("bin", "idx")
            ),
        }
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    heads = ["workers", "tool", "seconds", "start", "MB/s a core", "MB/CPU s"]
    heads += ["same bytes", "ratio"]
    print("  ".join(head.rjust(12) for head in heads))
    for row in rows:
        for side, name in ((US, ""), (THEM, "megatron_")):
            if f"{name}seconds" not in row:
                continue
            keys = ("seconds", "start_seconds", "mb_per_s_per_core", "mb_per_cpu_s")
            cells = [str(row["workers"]), side, *(f"{row[name + key]:.2f}" for key in keys)]
            if "ratio" in row and side == US:
                spread = f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}"
                cells += ["yes" if row["same_bytes"] else "NO", f"{row['ratio']:.2f} ({spread})"]
            print("  ".join(cell.rjust(12) for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megatron-tool", metavar="FILE", help="preprocess_data.py of a clone")
    parser.add_argument("--input", metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece model")
    parser.add_argument("--vocab-size", type=int, default=65536, help="of a model to be trained")
    parser.add_argument("--megabytes", type=float, default=64, help="of text, at least")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sides = [US]
    if options.megatron_tool:
        options.megatron_tool = os.path.abspath(options.megatron_tool)
        sides.append(THEM)
    with tempfile.TemporaryDirectory(prefix="preprocessing-") as name:
        folder = Path(name)
        text, model = folder / "text.jsonl", folder / "tokenizer.model"
        with contextlib.redirect_stdout(io.StringIO()):
            if options.input:
                text.symlink_to(os.path.abspath(options.input))
            else:
                articles(text, options.megabytes)
            if options.tokenizer_model:
                model.symlink_to(os.path.abspath(options.tokenizer_model))
            else:
                size = str(options.vocab_size)
                train_tokenizer.main(
                    ["--input", str(text), "--output", str(model), "--vocab-size", size]
                )
        rows = [measure(sides, options, text, model, workers) for workers in options.workers]
    if THEM not in sides:
        print("Megatron-LM's tool is not measured: name it with --megatron-tool FILE (see --help)")
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps({"benchmark": "preprocessing", **row}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"preprocessing: {error}")
