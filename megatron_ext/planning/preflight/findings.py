"""What a preflight found: a row of a table for each check, printed as it is known."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"


class CheckResult(NamedTuple):
    """What a check found that is not wrong.

    Attributes:
        text: in words; the fix too where it is a warning.
        status: OK, WARNING or SKIPPED.
        figures: for the JSON file.
    """

    text: str
    status: str = OK
    figures: dict[str, Any] = {}


class Report:
    """Rows of the table; the first rank prints them and, in the end, writes the JSON file.

    Args:
        rank: of this process.
        file: of JSON, if any.
    """

    def __init__(self, rank: int, file: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._output = sys.stdout if rank == 0 else None
        self._file = file if rank == 0 else None

    def add(self, check: str, found: CheckResult) -> None:
        """Add the row of one check."""
        text = " ".join(found.text.split())
        self.rows.append({"check": check, "status": found.status, "text": text, **found.figures})
        self._print(f"{found.status:<8} {check:<22} {text}")

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(row["status"] == FAILED for row in self.rows)

    def end(self) -> None:
        """Write the file, and tell how many checks ended how."""
        if self._file is not None:
            content = {"failed": self.failed, "checks": self.rows}
            try:
                Path(self._file).write_text(json.dumps(content, indent=1) + "\n")
            except OSError as error:
                message = f"{self._file} cannot be written ({error.strerror}): give another"
                self.add("--json", CheckResult(message, FAILED))
        counts = {s: sum(row["status"] == s for row in self.rows) for s in (OK, WARNING, FAILED)}
        self._print(", ".join(f"{count} {status}" for status, count in counts.items()))

    def _print(self, line: str) -> None:
        if self._output is not None:
            print(line, file=self._output, flush=True)
