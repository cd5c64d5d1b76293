"""Uniform sample of the lines of a corpus, on which tokenizers are trained."""

import heapq
import random
import re
from collections.abc import Iterable

_LINE = re.compile(r"[^\n]+\n*|\n+")  # with the blank lines that follow it


class LineSample:
    """Uniform sample of a stream's lines, in their order, within `max_lines` and `max_bytes`.

    Every line draws a random key, and the lines with the smallest keys stay. Once a key has been
    rejected, every larger key is rejected too, which keeps the sample uniform when lines differ in
    length.
    """

    def __init__(self, max_lines: int, max_bytes: int, seed: int):
        self.max_lines, self.max_bytes = max_lines, max_bytes
        self.seen_lines = self.seen_bytes = self.bytes = 0
        self._random = random.Random(seed)
        self._limit = 1.0
        self._heap: list[tuple[float, int, str]] = []  # (-key, position, line)

    def add(self, line: str) -> None:
        """Add the next line of the stream, or reject it."""
        key, size = self._random.random(), len(line.encode())
        self.seen_lines += 1
        self.seen_bytes += size
        if key >= self._limit:
            return
        heapq.heappush(self._heap, (-key, self.seen_lines, line))
        self.bytes += size
        while self.bytes > self.max_bytes or len(self._heap) > self.max_lines:
            largest, _, dropped = heapq.heappop(self._heap)
            self._limit = -largest
            self.bytes -= len(dropped.encode())

    def lines(self) -> list[str]:
        """Return the sample, in the order of the stream."""
        return [line for _, _, line in sorted(self._heap, key=lambda entry: entry[1])]


def sample_lines(
    texts: Iterable[str],
    max_lines: int,
    max_bytes: int,
    seed: int,
    keep_blank_lines: bool = False,
) -> LineSample:
    """Return a sample of the texts' lines.

    Each line includes its newline, which the tokenizer learns like any other character.

    Args:
        texts: The documents.
        max_lines: Maximum number of lines in the sample.
        max_bytes: Maximum size of the sample, in bytes.
        seed: Seed of the sample.
        keep_blank_lines: Whether a line includes the blank lines that follow it, so that the
            tokenizer learns runs of newlines.
    """
    sample = LineSample(max_lines, max_bytes, seed)
    for text in texts:
        if keep_blank_lines:
            for line in _LINE.findall(text):
                sample.add(line)
            continue
        for line in text.split("\n"):
            if line.strip():
                sample.add(line + "\n")
    return sample
