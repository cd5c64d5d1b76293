"""Responses for gold to label: the start policy's, real ones, and real ones spoilt.

    python -m examples.alignment.study.labels --real RESPONSES.jsonl --drawn RESPONSES.jsonl \\
        --save DIR --validation 100 --test 200 --seed 1

Of each prompt there are two: what the start policy wrote, and one of the others. DIR gets
train.jsonl, validation.jsonl and test.jsonl, which share no prompt.
"""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignment.data.source_rows import RecordWriter
from alignment.record_files import read_all
from alignment.records import Response
from megatron_ext.errors import ToolParser, UserError, run_tool


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
    """Words of the prompt, in their order, strewn over the text."""
    words = text.split()
    for word in prompt.split():
        if draw.random() < 0.5:
            words.insert(draw.randint(0, len(words)), word)
    return " ".join(words)


Spoil = Callable[[str, str, str, random.Random], str]
SPOILS: Mapping[str, Spoil] = {
    "real": lambda text, prompt, other, draw: text,
    "off-topic": lambda text, prompt, other, draw: other,
    "shuffled": _shuffled,
    "cut": _cut,
    "repeated": _repeated,
    "mixed": _mixed,
}


def spoilt(rows: Sequence[Response], seed: int) -> list[Response]:
    """One response to each prompt, real or spoilt in a way drawn at random."""
    draw = random.Random(seed)
    made = []
    for row in rows:
        way = draw.choice(list(SPOILS))
        other = draw.choice(rows).text
        text = SPOILS[way](row.text, row.prompt.messages[-1].content, other, draw)
        made.append(Response(f"{row.prompt.id}-{way}", row.prompt, text, way))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    real = read_all(Path(options.real), Response)
    drawn = {row.prompt.id: row for row in read_all(Path(options.drawn), Response)}
    if missing := [row.prompt.id for row in real if row.prompt.id not in drawn]:
        raise UserError(f"--drawn {options.drawn} has no response to the prompt {missing[0]!r}")
    begins = {"validation": 0, "test": options.validation}
    begins["train"] = options.validation + options.test
    if len(real) <= begins["train"]:
        raise UserError(
            f"--real has {len(real):,} prompts, and --validation and --test take "
            f"{begins['train']:,}: nothing is left for training"
        )
    others = spoilt(real, options.seed)
    ends = {"validation": begins["test"], "test": begins["train"], "train": len(real)}
    for name, begin in begins.items():
        with RecordWriter(Path(options.save) / f"{name}.jsonl", overwrite=True) as writer:
            for row, other in zip(real[begin : ends[name]], others[begin : ends[name]]):
                writer.write(drawn[row.prompt.id])
                writer.write(other)
        print(f"{name}: {writer.count:,} responses")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(
        prog="labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--real", required=True, metavar="FILE", help="responses of text to the prompts")
    add("--drawn", required=True, metavar="FILE", help="the start policy's to the same prompts")
    add("--save", required=True, metavar="DIR")
    add("--validation", type=int, required=True, metavar="PROMPTS")
    add("--test", type=int, required=True, metavar="PROMPTS")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_tool(main)
