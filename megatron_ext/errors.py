"""Mistakes of a user, reported as one sentence on standard error without a stack trace."""

import argparse
import errno
import os
import platform
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.console import console

# Failures of the machine that a user can fix. Other OSErrors are bugs and print a stack trace.
_FIXABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_STORE_PATIENCE = timedelta(seconds=10)

typed_command: str | None = None
"""Command as the user typed it, such as `et report`, when the console script `et` started it."""


class UserError(ValueError):
    """Mistake that a user can fix; the message is one sentence with the flag or file and the fix.

    Attributes:
        status: Exit status of a command that this error ends.
    """

    status = 2


class TooFewResults(UserError):
    """Failure of more items of a command than the user allows.

    The flags may be correct: an endpoint is down, or a judge does not answer in its format.
    """

    status = 3


class LimitExceeded(UserError):
    """Limit that the user sets and the command would exceed: a budget, or the memory of a device.

    The flags are correct, and the command may work with a higher limit.
    """

    status = 4


class ToolParser(argparse.ArgumentParser):
    """Argument parser whose errors are a `UserError`, without argparse's usage text.

    Words that are not UTF-8 are refused: Python passes their bytes as surrogate characters, which
    no tokenizer, file or terminal accepts.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if typed_command is not None and not self.prog.startswith("et "):
            is_alignment = self.prog.startswith("et-align")
            self.prog = self.prog.replace("et-align", "et align") if is_alignment else typed_command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments like argparse, after checking that all words are UTF-8.

        Raises:
            UserError: A word is not UTF-8, or a flag is wrong.
        """
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words):
            try:
                word.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(word).decode(errors="backslashreplace")
                flag = f"{before} " if before.startswith("--") else ""
                self.error(
                    f"{flag}{shown} is not UTF-8: check the encoding of the terminal or script"
                )
        return super().parse_known_args(words, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value, reporting every error of the converter as an argument error."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError:
            raise
        except Exception as error:  # for example of a converter that evaluates the text
            raise argparse.ArgumentError(action, f"invalid value: {arg_string!r}") from error

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`."""
        raise UserError(f"{message} (see --help)")


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a tool and exit with its code.

    The code is 0 on success, the status of a `UserError` (2; 3 for too few results; 4 for a limit
    that would be exceeded), or 130 on Ctrl-C. Error messages begin with the name of the tool on the
    command line.

    Args:
        main: Function that returns an exit code, or None for 0.
    """
    try:
        code = main() or 0
    except UserError as error:
        console.error(f"{_program()}: {' '.join(str(error).split())}")
        code = error.status
    except OSError as error:
        if error.errno not in _FIXABLE:
            raise
        console.error(f"{_program()}: {error.filename or 'output'}: {error.strerror}")
        code = 2
    except KeyboardInterrupt:
        console.error(f"{_program()}: interrupted")
        code = 130
    sys.exit(code)


def _program() -> str:
    """Return the name of the program for its messages."""
    return typed_command or Path(sys.argv[0]).stem


def run_on_ranks(main: Callable[[], int | None]) -> None:
    """Run a program that torchrun starts on many ranks.

    The process ends with a nonzero code of `main`, or with the status of a `UserError`. All ranks
    raise the same error at about the same time, and torchrun kills the others when the first one
    ends, so the first rank on each node prints the message.

    Args:
        main: Function that returns an exit code, or None for 0.
    """
    try:
        if code := main():
            sys.exit(code)
    except UserError as error:
        if _first_on_node():
            name = typed_command or Path(sys.argv[0]).name
            console.error(f"{name}: {' '.join(str(error).split())}")
        sys.exit(error.status)


def run_tool_or_ranks(main: Callable[[], int | None]) -> None:
    """Run a tool that works alone and, started by torchrun, on many ranks."""
    if "LOCAL_RANK" in os.environ:
        run_on_ranks(main)
    else:
        run_tool(main)


def _first_on_node() -> bool:
    """Return whether this is the first rank of the launch on this node that calls the function.

    The store of the launcher counts the calls. Without a store every rank is the first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return True
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_STORE_PATIENCE
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"megatron-et/error/{platform.node()}/{attempt}", 1) == 1
    except (RuntimeError, OSError, KeyError, ValueError):  # the launcher has ended
        return True
