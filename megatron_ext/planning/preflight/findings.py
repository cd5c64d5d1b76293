"""Report of a preflight: a row of a table for each check, printed when the check ends."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"


class CheckResult(NamedTuple):
    """Result of a check.

    Attributes:
        text: Result in words; a warning or failure also has the fix.
        status: OK, WARNING, FAILED or SKIPPED.
        values: Further values for the JSON file.
    """

    text: str
    status: str = OK
    values: dict[str, Any] = {}


class Report:
    """Table of results, which the first rank prints and finally writes to the JSON file.

    Args:
        rank: Rank of this process.
        file: JSON file to write, or None.

    Attributes:
        rows: Results so far.
    """

    def __init__(self, rank: int, file: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._output = sys.stdout if rank == 0 else None
        self._file = file if rank == 0 else None

    def add(self, check: str, result: CheckResult) -> None:
        """Add the row of one check."""
        text = " ".join(result.text.split())
        self.rows.append({"check": check, "status": result.status, "text": text, **result.values})
        self._print(f"{result.status:<8} {check:<22} {text}")

    @property
    def failed(self) -> bool:
        """Return whether any check failed."""
        return any(row["status"] == FAILED for row in self.rows)

    def end(self) -> None:
        """Write the JSON file, and print the number of checks with each status."""
        if self._file is not None:
            content = {"failed": self.failed, "checks": self.rows}
            try:
                Path(self._file).write_text(json.dumps(content, indent=1) + "\n")
            except OSError as error:
                message = f"{self._file} cannot be written ({error.strerror}): choose another"
                self.add("--json", CheckResult(message, FAILED))
        counts = {s: sum(row["status"] == s for row in self.rows) for s in (OK, WARNING, FAILED)}
        self._print(", ".join(f"{count} {status}" for status, count in counts.items()))

    def _print(self, line: str) -> None:
        """Print a line on the first rank."""
        if self._output is not None:
            print(line, file=self._output, flush=True)
