"""Output file of a command, with the description of how it was made next to it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignment.data.record_writer import Record, RecordWriter
from alignment.records import Verdict
from megatron_ext.data.row_files import expand_row_files
from megatron_ext.errors import UserError


class OutputFile:
    """Output file that is replaced only by the same command or with --overwrite.

    Attributes:
        path: The file of rows.
        about: The JSON file next to it, which states who made the rows, from what and with what
            result.
        made_with: Everything that the rows depend on.
    """

    def __init__(self, path: Path, input_file: Path, overwrite: bool, **made_with: Any) -> None:
        """Prepare the output, without touching any file.

        Args:
            path: The file of rows.
            input_file: The file that the rows are made from.
            overwrite: Whether to replace rows that were made otherwise.
            **made_with: Settings that the rows depend on.
        """
        self.path, self._input, self._overwrite = path, input_file, overwrite
        self.about = path.with_name(path.name + ".about.json")
        self.made_with = made_with

    def check_or_create(self, identity: str, maker: str = "judge") -> None:
        """Check that the output may be written, before anything is paid for.

        Args:
            identity: A hash of everything that the rows depend on.
            maker: What makes the rows, for the file next to them.

        Raises:
            UserError: If the file exists and was made otherwise.
        """
        digests = []
        for path in expand_row_files([str(self._input)]):
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        digest = digests[0] if len(digests) == 1 else digest
        self.made_with = {"input": digest, maker: identity, **self.made_with}
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        RecordWriter(self.path, overwrite=True)  # refuses an unknown suffix
        if not self.path.exists() or self._overwrite:
            return
        try:
            before = json.loads(self.about.read_text())["made_with"]
            changed = [name for name, value in self.made_with.items() if before.get(name) != value]
            problem = f"was made with another {' and '.join(changed)}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            changed, problem = ["everything"], "exists already"
        if changed:
            raise UserError(
                f"--output {self.path} {problem}. Add --overwrite to replace it, or choose another "
                "--output."
            )

    def write(self, records: Sequence[Record], details: Mapping[str, Any]) -> None:
        """Write the records, and next to them what they were made with.

        Args:
            records: The rows of the file.
            details: Further entries of the file next to it.
        """
        about = {"made_with": self.made_with, **details, "megatron-et": version("megatron-et")}
        temporary = self.about.with_name(f"{self.about.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(about, indent=1) + "\n")
        # The description is first: a run that is killed in between recognizes its own output.
        temporary.replace(self.about)
        with RecordWriter(self.path, overwrite=True) as writer:
            for record in records:
                writer.write(record)


def count_outcomes(records: Iterable[Record]) -> dict[str, int]:
    """Return the number of verdicts of each outcome."""
    outcomes = (str(record.outcome) for record in records if isinstance(record, Verdict))
    return dict(Counter(outcomes).most_common())


def format_outcomes(records: Iterable[Record]) -> str:
    """Return the number of verdicts of each outcome as text."""
    return ", ".join(f"{count:,} {name}" for name, count in count_outcomes(records).items())
