"""Counts of documents, tokens and malformed lines over all parts, and their limits."""

import itertools
from typing import Any

from megatron_ext.data.preprocessing.parts import MALFORMED_EXAMPLES, PartCounts, PartSpec
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

_COUNTED = ("lines", "documents", "tokens", "empty", "malformed")


class DocumentCounts:
    """Counts of documents, tokens and malformed lines, summed over the parts.

    Parts are added in the order of the files, so that line numbers refer to the file and a limit is
    exceeded at the same line for any number of workers.

    Attributes:
        files: Counts of each file, by its path.
        examples: The first malformed lines.
    """

    def __init__(self, specs: list[PartSpec], max_malformed: int, progress: Progress):
        self._shards = [shard for spec in specs for shard in spec.shards]
        self._limit, self._progress = max_malformed, progress
        self._next = 0
        self.documents = self.tokens = self.empty = self.malformed = 0
        self.examples: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, int]] = {}

    @property
    def summary(self) -> str:
        """Numbers of documents and tokens, for a progress line."""
        return f"{self.documents:,} documents, {self.tokens:,} tokens"

    def add(self, part: PartCounts) -> None:
        """Add the shards of the next part.

        Raises:
            UserError: There are more malformed lines than allowed, or a file has no document.
        """
        for counts in part["shards"]:
            self._add_shard(counts)

    def _add_shard(self, counts: dict[str, Any]) -> None:
        path = self._shards[self._next].path
        self._next += 1
        file = self.files.setdefault(path, dict.fromkeys(_COUNTED, 0))
        for line, reason in counts["malformed_lines"][: MALFORMED_EXAMPLES - len(self.examples)]:
            self.examples.append({"path": path, "line": file["lines"] + line, "reason": reason})
            self._progress.log(f"malformed: {self._shown(-1)}")
        for key in _COUNTED:
            file[key] += counts[key]
        self.documents += counts["documents"]
        self.tokens += counts["tokens"]
        self.empty += counts["empty"]
        self.malformed += counts["malformed"]
        if self.malformed > self._limit:
            raise UserError(
                f"{self.malformed:,} malformed lines up to {path} exceed --max-malformed "
                f"{self._limit:,}. The first is {self._shown(0)}. Fix the file or raise the limit."
            )
        last = self._next == len(self._shards) or self._shards[self._next].path != path
        if last and not file["documents"]:
            of_file = (i for i, example in enumerate(self.examples) if example["path"] == path)
            first = (f" The first malformed line is {self._shown(i)}." for i in of_file)
            reason = "".join(itertools.islice(first, 1))
            raise UserError(f"{path} contains no document.{reason} Fix the file or remove it.")

    def _shown(self, index: int) -> str:
        example = self.examples[index]
        return f"{example['path']}: line {example['line']}: {example['reason']}"
