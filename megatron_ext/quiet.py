"""Suppression of notices from Megatron and torch in the output of a tool."""

import logging
import os
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
