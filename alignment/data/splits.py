"""Division of rows into splits by their prompts, without near-duplicates across splits.

All rows of a prompt are in the same split. Splits have an order: the first keeps all its prompts,
and each later split drops the near-duplicates of prompts that remain in an earlier one. The split
of a prompt depends on the set of prompts and the seed, not on the order of the rows.
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
    """Name and size of a split.

    Attributes:
        name: Name of the split.
        size: Number of prompts, share of all prompts below 1, or `REST` for all remaining prompts.
    """

    name: str
    size: int | float | str

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Parse NAME=SIZE.

        Raises:
            UserError: The text has the wrong form.
        """
        name, _, size = text.partition("=")
        problem = f"--split {text} is not valid. Give NAME=1000, NAME=0.1 or NAME={REST}."
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
    """Return the words by which prompts are compared.

    These are the user's words, as different prompts may share the same system message. A prompt
    without a message of the user is compared by its last message.
    """
    contents = [message.content for message in prompt.messages if message.role == "user"]
    return words("\n".join(contents or [prompt.messages[-1].content]))


class Splitter:
    """Assignment of prompts to splits.

    Add all prompts, which may repeat, then call `assign`, then look up the split of each prompt. A
    distinct prompt takes about 300 bytes of memory and 512 bytes of disk.

    Attributes:
        sizes: Number of prompts of each split.
        near: Number of near-duplicates that were dropped from each split.
    """

    def __init__(self, splits: Sequence[Split], seed: int = 0, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise UserError("--near must be above 0 and at most 1.")
        names = [split.name for split in splits]
        if len(set(names)) < len(names):
            raise UserError(
                f"--split names {max(names, key=names.count)} twice. Name each split once."
            )
        if [split.size for split in splits[:-1]].count(REST):
            raise UserError(
                f"--split has {REST} before its last value. Only the last split can have it."
            )
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
        """Add a prompt; a repeated one has no effect."""
        text = text_of(prompt)
        key = self._key(text)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._signatures.add(text)

    def assign(self) -> None:
        """Assign all added prompts to the splits.

        Raises:
            UserError: The splits require more prompts than there are, or one remains empty.
        """
        keys = np.fromiter(self._numbers, np.uint64, len(self._numbers))
        order = np.argsort(keys)  # a random order, because the keys are hashes
        split_of = np.full(len(keys), DROPPED, dtype=np.int8)
        start = 0
        for number, size in enumerate(self._sizes(len(keys))):
            split_of[order[start : start + size]] = number
            start += size
        near, sizes = {}, {}
        for number, split in enumerate(self.splits):
            members = np.flatnonzero(split_of == number)
            earlier = np.flatnonzero((split_of >= 0) & (split_of < number))
            close = self._signatures.near(members, earlier, self.threshold)
            split_of[members[close]] = DROPPED
            near[split.name], sizes[split.name] = int(close.sum()), int((~close).sum())
            if not sizes[split.name]:
                raise UserError(
                    f"--split {split.name}={split.size} leaves no prompt for it. "
                    "Choose another size."
                )
        self._split_of, self.near, self.sizes = split_of, near, sizes

    def _sizes(self, prompts: int) -> list[int]:
        requested = [split.size for split in self.splits]
        sizes = [
            0 if size == REST else size if isinstance(size, int) else round(float(size) * prompts)
            for size in requested
        ]
        if sum(sizes) > prompts:
            raise UserError(f"--split requires {sum(sizes):,} prompts, and there are {prompts:,}.")
        if requested[-1] == REST:
            sizes[-1] = prompts - sum(sizes)
        return sizes

    def split_of(self, prompt: Prompt) -> str | None:
        """Return the name of the split of an added prompt, or None if it was dropped."""
        assert self._split_of is not None
        number = self._split_of[self._numbers[self._key(text_of(prompt))]]
        return None if number == DROPPED else self.splits[number].name
