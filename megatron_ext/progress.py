"""Progress of a tool through its input."""

import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """Progress display with speed and remaining time, on stdout.

    It is a bar on a terminal, and otherwise a line every ten seconds. stderr remains for errors.

    Args:
        label: Name of the task.
        total: Size of the task, in bytes or in `unit`.
        unit: Unit in the plural, such as "sequences". Default: bytes.
    """

    INTERVAL = 10.0  # seconds between lines

    def __init__(self, label: str, total: int, unit: str | None = None):
        self.label, self.total, self.unit = label, max(1, total), unit
        self._begin = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich import progress

            counts: list[Any] = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            if self.unit is not None:
                counts = [progress.MofNCompleteColumn(), progress.TextColumn(self.unit)]
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), *counts,
                progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._task = self._bar.add_task(self.label, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show how much of the total is done, followed by a note."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self.INTERVAL:
            self._last = now
            speed = done / (now - self._begin)
            seconds = round((self.total - done) / speed) if speed else 0
            left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            left = left if speed else "unknown"
            unit, scale = ("MB", 1e6) if self.unit is None else (self.unit, 1)
            print(
                f"{self.label}: {done / self.total:.0%} of "
                f"{self.total / scale:,.{int(self.unit is None)}f} {unit}, "
                f"{speed / scale:.1f} {unit}/s, ETA {left}"
                f"{', ' + note if note else ''}",
                flush=True,
            )

    def log(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)


def write_with_progress(
    label: str, total: int, write: Callable[[Callable[[int], None]], None]
) -> None:
    """Run a function that writes files, and display its progress.

    Args:
        label: Name of the task.
        total: Number of bytes to write.
        write: Function that writes. It calls its argument with the size of each piece written.
    """
    with Progress(label, total) as progress:
        written = 0

        def done(size: int) -> None:
            nonlocal written
            written += size
            progress.update(written)

        write(done)
