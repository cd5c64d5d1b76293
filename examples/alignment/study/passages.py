"""Prompts and responses from plain text: a sentence, and the one that follows it.

python -m examples.alignment.study.passages --text TEXT.jsonl --output RESPONSES.jsonl
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.data.source_rows import RecordWriter
from alignment.records import Message, Prompt, Response
from megatron_ext.errors import ToolParser, UserError, run_tool

_BETWEEN = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PROMPT_WORDS, RESPONSE_WORDS = (6, 16), (8, 24)  # the fewest and the most


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Neighbouring sentences of a text that have fitting lengths; each sentence is in one pair."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(
        prog="passages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="JSON lines with a text")
    parser.add_argument("--output", required=True, metavar="FILE")
    options = parser.parse_args(argv)
    seen: set[str] = set()
    with (
        Path(options.text).open(encoding="utf-8") as lines,
        RecordWriter(Path(options.output), overwrite=True) as writer,
    ):
        for line in lines:
            for first, second in passages(json.loads(line)["text"]):
                if first not in seen:
                    seen.add(first)
                    name = hashlib.sha256(first.encode()).hexdigest()[:12]
                    prompt = Prompt(name, [Message("user", first)])
                    writer.write(Response(f"{name}-text", prompt, second, "text"))
        if not writer.count:
            raise UserError(f"--text {options.text} has no neighbouring sentences of these lengths")
    print(f"{writer.count:,} passages")


if __name__ == "__main__":
    run_tool(main)
