"""The sum of the parts, and the limits on what may be wrong with them."""

import itertools
from typing import Any

from megatron_ext.data.preprocessing.parts import KEPT_MALFORMED, PartCounts, PartSpec
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

_COUNTED = ("lines", "documents", "tokens", "empty", "malformed")


class DocumentCounts:
    """Adds parts up in the files' order, so that malformed lines get their number in the file and
    the limits are met at the same place for any number of workers.

    Attributes:
        files: Counts of each file, by its path.
        examples: The first malformed lines.
    """

    def __init__(self, works: list[PartSpec], max_malformed: int, progress: Progress):
        self._shards = [shard for work in works for shard in work.shards]
        self._limit, self._progress = max_malformed, progress
        self._next = 0
        self.documents = self.tokens = self.empty = self.malformed = 0
        self.examples: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, int]] = {}

    @property
    def summary(self) -> str:
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
        for line, reason in counts["malformed_lines"][: KEPT_MALFORMED - len(self.examples)]:
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
                f"{self.malformed:,} malformed lines by {path}, more than --max-malformed "
                f"{self._limit:,}; the first is {self._shown(0)}"
            )
        last = self._next == len(self._shards) or self._shards[self._next].path != path
        if last and not file["documents"]:
            of_file = (i for i, example in enumerate(self.examples) if example["path"] == path)
            why = "".join(f": {self._shown(i)}" for i in itertools.islice(of_file, 1))
            raise UserError(f"{path} holds no document, leave it out or fix it{why}")

    def _shown(self, index: int) -> str:
        example = self.examples[index]
        return f"{example['path']}: line {example['line']}: {example['reason']}"
