"""Splits of rows by their prompts, without near-duplicates across splits.

All rows of a prompt are in one split. Splits have an order: the first keeps all its prompts, and
each later one loses those that are near to a prompt kept in an earlier one. Which split a prompt
is in depends on the prompts and the seed, and not on their order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from alignment.data.near_duplicates import Signatures, words
from alignment.records import Prompt
from megatron_ext.errors import UserError

REST = "rest"
DROPPED = -1


@dataclass(frozen=True)
class Split:
    """A name, and a number of prompts, a share of them, or `REST`: all that others leave."""

    name: str
    size: int | float | str

    @classmethod
    def parse(cls, text: str) -> "Split":
        """From NAME=SIZE.

        Raises:
            UserError: it is something else.
        """
        name, _, size = text.partition("=")
        problem = f"--split {text}: give NAME=1000, NAME=0.1 or NAME={REST}"
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(problem)
        if size == REST:
            return cls(name, REST)
        try:
            number: int | float = int(size) if size.isdecimal() else float(size)
        except ValueError:
            raise UserError(problem) from None
        if not (number > 0 and (isinstance(number, int) or number < 1)):
            raise UserError(problem)
        return cls(name, number)


def text_of(prompt: Prompt) -> list[str]:
    """The words that make prompts alike: the user's. Different prompts may share the others'."""
    said = [message.content for message in prompt.messages if message.role == "user"]
    return words("\n".join(said or [prompt.messages[-1].content]))


class Splitter:
    """Takes prompts, repeated ones too, and then tells the split of each.

    Memory: some 300 bytes a different prompt, and 512 of a file.

    Attributes:
        near: how many prompts were left out of each split.
        sizes: how many prompts each split has.
    """

    def __init__(self, splits: Sequence[Split], seed: int = 0, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise UserError("--near must be above 0 and at most 1")
        names = [split.name for split in splits]
        if len(set(names)) < len(names):
            raise UserError(f"--split names {max(names, key=names.count)} twice")
        if [split.size for split in splits[:-1]].count(REST):
            raise UserError(f"--split: only the last one can be {REST}")
        self.splits, self.threshold = splits, threshold
        self._salt = seed.to_bytes(8, "little", signed=True)
        self._numbers: dict[int, int] = {}  # prompts by hash, in order of arrival
        self._signatures = Signatures()
        self._split_of: np.ndarray | None = None
        self.sizes: Mapping[str, int] = {}
        self.near: Mapping[str, int] = {}

    def _key(self, text: Sequence[str]) -> int:
        joined = " ".join(text).encode()
        return int.from_bytes(blake2b(joined, digest_size=8, key=self._salt).digest(), "little")

    def add(self, prompt: Prompt) -> None:
        text = text_of(prompt)
        key = self._key(text)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._signatures.add(text)

    def assign(self) -> None:
        """Decide, when all prompts have been added.

        Raises:
            UserError: the splits need more prompts than there are, or one gets none.
        """
        keys = np.fromiter(self._numbers, np.uint64, len(self._numbers))
        order = np.argsort(keys)  # at random, as keys are
        split_of = np.full(len(keys), DROPPED, dtype=np.int8)
        start = 0
        for number, size in enumerate(self._sizes(len(keys))):
            split_of[order[start : start + size]] = number
            start += size
        near, sizes = {}, {}
        for number, split in enumerate(self.splits):
            mine = np.flatnonzero(split_of == number)
            earlier = np.flatnonzero((split_of >= 0) & (split_of < number))
            close = self._signatures.near(mine, earlier, self.threshold)
            split_of[mine[close]] = DROPPED
            near[split.name], sizes[split.name] = int(close.sum()), int((~close).sum())
            if not sizes[split.name]:
                raise UserError(f"--split {split.name}={split.size} leaves no prompt for it")
        self._split_of, self.near, self.sizes = split_of, near, sizes

    def _sizes(self, prompts: int) -> list[int]:
        wanted = [s.size for s in self.splits]
        sizes = [
            0 if size == REST else size if isinstance(size, int) else round(float(size) * prompts)
            for size in wanted
        ]
        if sum(sizes) > prompts:
            raise UserError(f"--split requires {sum(sizes):,} prompts, and there are {prompts:,}.")
        if wanted[-1] == REST:
            sizes[-1] = prompts - sum(sizes)
        return sizes

    def split_of(self, prompt: Prompt) -> str | None:
        """The name of the split of a prompt that was added; None where it is left out."""
        assert self._split_of is not None
        number = self._split_of[self._numbers[self._key(text_of(prompt))]]
        return None if number == DROPPED else self.splits[number].name
