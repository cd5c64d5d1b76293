"""Console of a training process, and the log that receives all other output.

Megatron, torch and the libraries below them print hundreds of lines, through `print`, `logging`,
`warnings` and from C++. After `console.capture()` the file descriptors of standard output and
standard error lead to a log. Only this reaches the terminal: text printed with the methods of
`console`, errors that libraries log, and the traceback of an exception that ends the process.
Without a capture the methods print as usual.

The log is a file that is opened for appending, so that it is complete after a kill, and lines of
several ranks do not overwrite each other. Until its path is known the output waits in a temporary
file without a name.
"""

import atexit
import faulthandler
import io
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

_LAST_LINES = 50  # of the log, printed if a process without a log file fails


class Console:
    """Terminal of this process: plain lines, colored and rewritten only on a terminal."""

    def __init__(self) -> None:
        """Start without a capture."""
        self._capture: _Capture | None = None
        self._status = False

    @property
    def is_terminal(self) -> bool:
        """Whether standard output is a terminal."""
        with suppress(ValueError):  # closed
            return self._out.isatty()
        return False

    @property
    def is_captured(self) -> bool:
        """Whether all other output goes to a log."""
        return self._capture is not None

    def line(self, text: str, style: str = "") -> None:
        """Print a line on standard output, in a style of rich if that is a terminal."""
        self._clear_status()
        self._print(text, self._out, style)

    def alarm(self, text: str) -> None:
        """Print a line on standard output that needs attention."""
        self.line(text, "bold red")

    def warn(self, text: str) -> None:
        """Print a line on standard error."""
        self._clear_status()
        self._print(text, self._err, "yellow")

    def error(self, text: str) -> None:
        """Print the line with which a process fails on standard error."""
        self._clear_status()
        self._print(text, self._err, "")

    def status(self, text: str) -> None:
        """Show a line that the next one replaces, on a terminal only."""
        if self.is_terminal:
            with suppress(OSError, ValueError):
                columns = os.get_terminal_size(self._out.fileno()).columns
                self._clear_status()
                print(text[: columns - 1], end="", file=self._out, flush=True)
                self._status = True

    def capture(self) -> None:
        """Redirect all other output of this process to the log."""
        if self._capture is None:
            self._capture = _Capture(self.release)

    def log_to(self, path: Path) -> None:
        """Append what was captured so far, and everything after it, to a file.

        Args:
            path: File of the log. Its folder is created if it does not exist.
        """
        if self._capture is not None:
            self._capture.log_to(path)

    def release(self) -> None:
        """Let all output reach the terminal again."""
        if self._capture is not None:
            self._clear_status()
            self._capture.end()
            self._capture = None

    @property
    def _out(self) -> TextIO:
        return sys.stdout if self._capture is None else self._capture.out

    @property
    def _err(self) -> TextIO:
        return sys.stderr if self._capture is None else self._capture.err

    def _print(self, text: str, stream: TextIO, style: str) -> None:
        # Training must not fail because the reader of its output has ended.
        with suppress(OSError, ValueError):
            if style and stream.isatty():
                from rich.console import Console as RichConsole

                rich = RichConsole(file=stream)
                rich.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=stream, flush=True)
        if self._capture is not None:
            self._capture.write(text + "\n")

    def _clear_status(self) -> None:
        if self._status:
            self._status = False
            with suppress(OSError, ValueError):
                print("\r\x1b[K", end="", file=self._out, flush=True)


def log_name() -> str:
    """Return the name of the log of this node.

    The first node has `train.log`. Another node has a separate file, because network file systems
    do not append from several nodes at once.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node = int(os.environ.get("RANK", "0")) // max(ranks, 1)
    return f"train.node{node}.log" if node else "train.log"


class _Capture:
    """Redirection of the file descriptors 1 and 2.

    Attributes:
        out: Standard output as it was before.
        err: Standard error as it was before.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.flush()
                # One write per line: torchrun starts Python with -u, which writes a line and its
                # end apart, and another process may write in between.
                stream.reconfigure(line_buffering=True, write_through=False)
        self._before = os.dup(1), os.dup(2)
        self.out = self._terminal(sys.stdout, self._before[0], 1)
        self.err = self._terminal(sys.stderr, self._before[1], 2)
        self._file: Any = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        self._is_named = False
        self._redirect()
        logging.basicConfig()  # has no effect, and nothing is lost, where a library has called it
        self._errors = _ErrorLines(self.err)
        logging.getLogger().addHandler(self._errors)
        self._release, self._hook = release, sys.excepthook
        sys.excepthook = self._report
        self._had_handler = faulthandler.is_enabled()
        if not self._had_handler:
            faulthandler.enable(self._before[1])
        # Threads and signal handlers may print until the process ends.
        atexit.register(self._flush)

    @staticmethod
    def _terminal(stream: TextIO, copy: int, number: int) -> TextIO:
        """Return a stream on the copy of a file descriptor, or one that Python has replaced."""
        try:
            if stream.fileno() != number:
                return stream
        except (OSError, ValueError):  # not on a file descriptor
            return stream
        return open(copy, "w", buffering=1, errors="backslashreplace", closefd=False)

    def log_to(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._flush()
        file: Any = open(path, "ab", buffering=0)  # noqa: SIM115
        if not self._is_named:
            self._file.seek(0)
            file.write(self._file.read())
        self._file.close()
        self._file, self._is_named = file, True
        self._redirect()

    def write(self, text: str) -> None:
        """Write text to the log, unless the terminal is a stream that Python has replaced."""
        with suppress(OSError, ValueError):
            self._flush()
            self._file.write(text.encode(errors="backslashreplace"))

    def end(self) -> None:
        self._flush()
        for number, copy in enumerate(self._before, 1):
            os.dup2(copy, number)
            os.close(copy)
        self._file.close()
        sys.excepthook = self._hook
        logging.getLogger().removeHandler(self._errors)
        if not self._had_handler:
            faulthandler.disable()
        atexit.unregister(self._flush)

    def _redirect(self) -> None:
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    def _report(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Print the traceback of an exception that ends the process, in the log and on stderr."""
        rank = os.environ.get("RANK")
        where = "" if rank is None else f"rank {rank}: "
        self.write(where + "".join(traceback.format_exception(kind, error, trace)))
        last: list[bytes] = []
        if not self._is_named:
            self._file.seek(0)
            last = self._file.read().splitlines(keepends=True)[-_LAST_LINES:]
        self._release()
        if last:
            sys.stderr.write(b"".join(last).decode(errors="replace"))
        else:
            self._hook(kind, error, trace)


class _ErrorLines(logging.Handler):
    """Handler that shows errors on the terminal, after which libraries may end the process."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.ERROR)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        rank = os.environ.get("RANK")
        where = "" if rank is None else f"[rank{rank}]: "
        with suppress(OSError, ValueError):
            print(f"{where}{record.name}: {record.getMessage()}", file=self._stream, flush=True)


console = Console()
"""Console of this process."""
