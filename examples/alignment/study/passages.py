"""Make prompts and responses from plain text: a sentence and the one that follows it.

python -m examples.alignment.study.passages --text TEXT.jsonl --output RESPONSES.jsonl
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.data.record_writer import RecordWriter
from alignment.records import Message, Prompt, Response
from megatron_ext.errors import UserError, run_tool
from megatron_ext.typed_flags import flag, parse_config

_BETWEEN = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PROMPT_WORDS, RESPONSE_WORDS = (6, 16), (8, 24)  # minimum and maximum


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of adjacent sentences of fitting lengths; each sentence is in one pair."""
    sentences = [" ".join(part.split()) for part in _BETWEEN.split(text)]
    place = 0
    while place + 1 < len(sentences):
        first, second = sentences[place : place + 2]
        if _fits(first, PROMPT_WORDS) and _fits(second, RESPONSE_WORDS):
            yield first, second
            place += 1
        place += 1


def _fits(sentence: str, words: tuple[int, int]) -> bool:
    return words[0] <= len(sentence.split()) <= words[1] and sentence[-1] in ".!?"


@dataclass(frozen=True, kw_only=True)
class PassagesConfig:
    """Flags of the example."""

    text: str = flag(metavar="FILE")
    """JSON lines with a text each."""
    output: str = flag(metavar="FILE")
    """File of responses to write, .jsonl."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(PassagesConfig, argv, "passages", __doc__)
    used: set[str] = set()
    with (
        Path(options.text).open(encoding="utf-8") as lines,
        RecordWriter(Path(options.output), overwrite=True) as writer,
    ):
        for line in lines:
            for first, second in passages(json.loads(line)["text"]):
                if first not in used:
                    used.add(first)
                    name = hashlib.sha256(first.encode()).hexdigest()[:12]
                    prompt = Prompt(name, [Message("user", first)])
                    writer.write(Response(f"{name}-text", prompt, second, "text"))
        if not writer.count:
            raise UserError(f"--text {options.text} has no adjacent sentences of fitting lengths.")
    print(f"{writer.count:,} passages")


if __name__ == "__main__":
    run_tool(main)
