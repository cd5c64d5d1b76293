"""Keeping the output of a tool free of Megatron's and torch's notices."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Keep stdout for results, and stderr free of Megatron's and torch's notices."""
    with quiet_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Keep stderr free of Megatron's and torch's notices."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
