"""Select responses for the gold judge to label: generated, real and corrupted ones.

    python -m examples.alignment.study.labels --real RESPONSES.jsonl \\
        --start-responses RESPONSES.jsonl --save DIR --validation 100 --test 200 --seed 1

Each prompt has two: the response of the start policy, and a real or corrupted one. They are
written to train.jsonl, validation.jsonl and test.jsonl, which share no prompt.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.data.record_writer import RecordWriter
from alignment.record_files import read_all
from alignment.records import Response
from megatron_ext.errors import UserError, run_tool
from megatron_ext.typed_flags import flag, parse_config


def _shuffled(text: str, prompt: str, other: str, draw: random.Random) -> str:
    return " ".join(draw.sample(words := text.split(), len(words)))


def _cut(text: str, prompt: str, other: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join(words[: draw.randint(1, len(words) - 1)])


def _repeated(text: str, prompt: str, other: str, draw: random.Random) -> str:
    words = text.split()
    piece = words[: draw.randint(1, 6)]
    return " ".join((piece * 24)[: len(words)])


def _mixed(text: str, prompt: str, other: str, draw: random.Random) -> str:
    """Insert words of the prompt, in their order, at random places of the text."""
    words = text.split()
    for word in prompt.split():
        if draw.random() < 0.5:
            words.insert(draw.randint(0, len(words)), word)
    return " ".join(words)


Corruption = Callable[[str, str, str, random.Random], str]
CORRUPTIONS: Mapping[str, Corruption] = {
    "real": lambda text, prompt, other, draw: text,
    "off-topic": lambda text, prompt, other, draw: other,
    "shuffled": _shuffled,
    "cut": _cut,
    "repeated": _repeated,
    "mixed": _mixed,
}


def corrupt(rows: Sequence[Response], seed: int) -> list[Response]:
    """Return one response to each prompt, real or corrupted in a random way."""
    draw = random.Random(seed)
    made = []
    for row in rows:
        way = draw.choice(list(CORRUPTIONS))
        other = draw.choice(rows).text
        text = CORRUPTIONS[way](row.text, row.prompt.messages[-1].content, other, draw)
        made.append(Response(f"{row.prompt.id}-{way}", row.prompt, text, way))
    return made


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Flags of the example."""

    real: str = flag(metavar="FILE")
    """Responses of the text to the prompts."""
    start_responses: str = flag(metavar="FILE")
    """Responses of the start policy to the same prompts."""
    save: str = flag(metavar="DIR")
    """Folder to write train.jsonl, validation.jsonl and test.jsonl into."""
    validation: int = flag(metavar="PROMPTS", at_least=1)
    """Number of prompts for validation."""
    test: int = flag(metavar="PROMPTS", at_least=1)
    """Number of prompts for the test."""
    seed: int = flag(0)
    """Seed of the corruptions."""


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    real = read_all(Path(options.real), Response)
    start = {row.prompt.id: row for row in read_all(Path(options.start_responses), Response)}
    if missing := [row.prompt.id for row in real if row.prompt.id not in start]:
        raise UserError(
            f"--start-responses {options.start_responses} has no response to the prompt "
            f"{missing[0]!r}. Generate it."
        )
    begins = {"validation": 0, "test": options.validation}
    begins["train"] = options.validation + options.test
    if len(real) <= begins["train"]:
        raise UserError(
            f"--real has {len(real):,} prompts, and --validation and --test take "
            f"{begins['train']:,}, so that none is left for training. Lower them."
        )
    others = corrupt(real, options.seed)
    ends = {"validation": begins["test"], "test": begins["train"], "train": len(real)}
    for name, begin in begins.items():
        with RecordWriter(Path(options.save) / f"{name}.jsonl", overwrite=True) as writer:
            for row, other in zip(real[begin : ends[name]], others[begin : ends[name]]):
                writer.write(start[row.prompt.id])
                writer.write(other)
        print(f"{name}: {writer.count:,} responses")


def _parse(argv: Sequence[str] | None) -> LabelsConfig:
    return parse_config(LabelsConfig, argv, "labels", __doc__)


if __name__ == "__main__":
    run_tool(main)
