"""What an annotation leaves: rows, and beside them what they were made with."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignment.data.source_rows import Record, RecordWriter
from alignment.records import Verdict
from megatron_ext.errors import UserError


class Output:
    """The file of rows, which is replaced only by the same command or with --overwrite.

    Attributes:
        about: the JSON file beside it: who judged, from what, and what came of it.
    """

    def __init__(self, path: Path, input_file: Path, overwrite: bool, **made_with: Any) -> None:
        self.path, self._input, self._overwrite = path, input_file, overwrite
        self.about = path.with_name(path.name + ".about.json")
        self.made_with = made_with

    def claim(self, identity: str, who: str = "judge") -> None:
        """Tell who judges, before anything is paid for.

        Args:
            identity: a hash of all that its verdicts depend on.
            who: the judge, or what else makes the rows.

        Raises:
            UserError: the file is there and was made otherwise.
        """
        with open(self._input, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.made_with = {"input": digest, who: identity, **self.made_with}
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        RecordWriter(self.path, overwrite=True)  # refuses a suffix before anything is paid for
        if not self.path.exists() or self._overwrite:
            return
        try:
            before = json.loads(self.about.read_text())["made_with"]
            other = [name for name, value in self.made_with.items() if before.get(name) != value]
            what = f"was made with another {' and '.join(other)}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            other, what = ["everything"], "is there already"
        if other:
            raise UserError(
                f"--output {self.path} {what}: give --overwrite to replace it, or another --output"
            )

    def write(self, records: Sequence[Record], told: Mapping[str, Any]) -> None:
        """Write the records and what they were made with; `told` is added for readers."""
        about = {"made_with": self.made_with, **told, "megatron-et": version("megatron-et")}
        temporary = self.about.with_name(f"{self.about.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        # First: a run that is killed in between is known as ours and writes both again.
        temporary.replace(self.about)
        with RecordWriter(self.path, overwrite=True) as writer:
            for record in records:
                writer.write(record)


def counted(records: Iterable[Record]) -> dict[str, int]:
    """How many verdicts there are of each outcome."""
    outcomes = (str(record.outcome) for record in records if isinstance(record, Verdict))
    return dict(Counter(outcomes).most_common())


def outcomes(records: Iterable[Record]) -> str:
    """The same in words."""
    return ", ".join(f"{count:,} {outcome}" for outcome, count in counted(records).items())
