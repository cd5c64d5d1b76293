"""Mistakes of a user, reported as one sentence on standard error without a stack trace."""

import argparse
import errno
import json
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from traceback import format_exception_only
from typing import Any, NoReturn

from megatron_ext.console import console

# Failures of the machine that a user can fix. Other OSErrors are bugs and print a stack trace.
_FIXABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_NUMBERS = {int: "a whole number", float: "a number"}
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
    """Argument parser whose errors are a `UserError`: one sentence with the flag and the fix.

    A wrong flag or choice is answered with the nearest right one; abbreviations are refused. So are
    words that are not UTF-8: Python passes their bytes as surrogate characters, which no tokenizer,
    file or terminal accepts.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)
        if typed_command is not None and not self.prog.startswith("et "):
            is_alignment = self.prog.startswith("et-align")
            self.prog = self.prog.replace("et-align", "et align") if is_alignment else typed_command

    @property
    def command(self) -> str:
        """Name of the command in messages."""
        return self.prog.removeprefix("python -m ").removeprefix("et-align ")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments like argparse, after checking the names of the flags.

        Raises:
            UserError: A flag or its value is wrong, a required flag is missing, or a flag for a
                list is repeated.
        """
        words = sys.argv[1:] if args is None else list(args)
        flags = self._option_string_actions
        lists: set[str] = set()
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            if name in flags and takes_list(flags[name]):
                # argparse takes the last list and says nothing about the others.
                if flags[name].dest in lists:
                    raise UserError(f"{name} is repeated. Write all values after one {name}.")
                lists.add(flags[name].dest)
            # A word with a space is a value, such as flags for another program.
            if name.startswith("--") and " " not in name and name not in flags:
                near = get_close_matches(name, flags, n=1)
                advice = f"Did you mean {near[0]}?" if near else f"See {self.prog} --help."
                raise UserError(f"{name} is not a flag of {self.command}. {advice}")
        return super().parse_args(words, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments like argparse, after checking that all words are UTF-8.

        Raises:
            UserError: A word is not UTF-8, or a flag is wrong.
        """
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words):
            try:
                word.encode()
            except UnicodeEncodeError as error:
                text = os.fsencode(word).decode(errors="backslashreplace")
                flag = f"{before} " if before.startswith("--") else ""
                raise UserError(
                    f"{flag}{text} is not UTF-8. Check the encoding of the terminal or script."
                ) from error
        return super().parse_known_args(words, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value, reporting every error of the converter as a `UserError`."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except Exception as error:  # for example of a converter that evaluates the text
            required = _NUMBERS.get(action.type, "valid")  # type: ignore[call-overload]
            raise UserError(f"{_option(action)} {arg_string} is not {required}.") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among the choices, with the nearest of them."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = get_close_matches(str(value), choices, n=1)
            advice = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{_option(action)} {value} is not one of {', '.join(choices)}.{advice}"
            )

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` with the message of argparse as a sentence."""
        missing = message.partition("the following arguments are required: ")[2]
        if missing:
            raise UserError(f"{self.command} requires {missing}. See {self.prog} --help.")
        name, expected, count = message.removeprefix("argument ").partition(": expected ")
        if expected:
            values = count.replace("arguments", "values").replace("argument", "value")
            raise UserError(f"{name} requires {values}. See {self.prog} --help.")
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def takes_list(action: argparse.Action) -> bool:
    """Return whether a flag takes any number of values, and only the last list counts."""
    return isinstance(action, argparse._StoreAction) and action.nargs in ("+", "*")


def _option(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a tool and exit with its code.

    The code is 0 on success, the status of a `UserError` (2; 3 for too few results; 4 for a limit
    that would be exceeded), 130 on Ctrl-C, or 141 where the reader of the output has ended, as in
    `| head`. Error messages begin with the name of the tool on the command line.

    Args:
        main: Function that returns an exit code, or None for 0.
    """
    try:
        code = _unless_nobody_reads(main)
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
    ends, so the first rank on each node prints the message. torchrun then prints a second stack
    trace, which ends in the message again, as the cause.

    Args:
        main: Function that returns an exit code, or None for 0.
    """
    try:
        if code := _unless_nobody_reads(main):
            sys.exit(code)
    except UserError as error:
        report_failure(str(error))
        sys.exit(error.status)
    except Exception as error:
        _report_cause(f"{''.join(format_exception_only(error)).strip()} (stack trace above)")
        raise


def report_failure(message: str) -> None:
    """Print why this program fails, once on each node, and let torchrun end with it.

    Args:
        message: Sentence about the mistake and its fix.
    """
    name = typed_command or Path(sys.argv[0]).name
    line = f"{name}: {' '.join(message.split())}"
    _report_cause(line)
    if _first_on_node():
        console.error(line)


def _report_cause(cause: str) -> None:
    """Write why this rank fails into the file from which torchrun reads the cause.

    Without the file, torchrun ends with a link to its documentation in place of the cause.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": cause, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": cause, "extraInfo": more}}))


def run_tool_or_ranks(main: Callable[[], int | None]) -> None:
    """Run a tool that works alone and, started by torchrun, on many ranks."""
    if "LOCAL_RANK" in os.environ:
        run_on_ranks(main)
    else:
        run_tool(main)


def _unless_nobody_reads(main: Callable[[], int | None]) -> int:
    """Return the exit code of `main`, or that of a process that SIGPIPE ends.

    Python ignores SIGPIPE, so that printing into a pipe whose reader has ended raises an error.
    """
    try:
        try:
            code = main() or 0
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_has_ended():  # another pipe or a socket
            raise
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _reader_has_ended() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError):  # not a file descriptor
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


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
