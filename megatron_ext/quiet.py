"""Suppression of notices from Megatron and torch in the output of a tool."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from megatron_ext.console import console


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Discard everything written to stdout, and suppress warnings, in this context.

    In a process whose console has a log, all of it goes there.
    """
    if console.is_captured:
        yield
        return
    with quiet_warnings(), open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        yield


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Suppress warnings, and log messages up to the level of warnings, in this context.

    In a process whose console has a log, all of it goes there.
    """
    if console.is_captured:
        yield
        return
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Discard what libraries in C++ write to stdout in this context.

    Gloo of torch 2.9 and 2.10 names the ranks of every new group there. In a process whose console
    has a log, all of it goes there.
    """
    if console.is_captured or sys.__stdout__ is None:  # the latter if stdout is closed
        yield
        return
    sys.__stdout__.flush()
    stdout = os.dup(1)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
