"""Process in which the function of a judge runs, started by `FunctionJudge`."""

import inspect
import math
import os
import runpy
import signal
import sys
import threading
import time
from difflib import get_close_matches
from multiprocessing.connection import Connection
from typing import Any

from alignment.records import Response


def main(handle: str, file: str, name: str) -> None:
    """Load the function, then score each response that arrives until the connection ends.

    The first message to the parent is the reason why the function cannot be loaded, or empty. Then
    each response is answered by its score and the reason if there is none.

    Args:
        handle: The file descriptor of the connection to the parent.
        file: The file of the function.
        name: The name of the function.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles Ctrl-C and ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(int(handle))
    sys.argv = [file]
    try:
        defined = runpy.run_path(file)
        if name not in defined:
            functions = [key for key, value in defined.items() if inspect.isfunction(value)]
            near = get_close_matches(name, functions, n=1)
            advice = f" Did you mean {near[0]}?" if near else ""
            connection.send(f"the file defines no {name}.{advice}")
            return
        score = defined[name]
        if not callable(score):
            raise TypeError(f"{name} is {score!r:.40}")
    except (Exception, SystemExit) as error:  # code of the user may raise any exception
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            item: Response = connection.recv()
        except EOFError:
            return
        try:
            connection.send((_number(score(item)), ""))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))


def _end_with(parent: int) -> None:
    """End this process with its parent, because an endless function would outlive a killed one."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _number(value: Any) -> float | None:
    """Return a score, or None for None; raise a ValueError or TypeError for anything else."""
    if value is None:
        return None
    score = float(value)
    if isinstance(value, str | bytes | bool) or not math.isfinite(score):
        raise ValueError(f"the function returned {value!r}, which is not a finite number")
    return score


if __name__ == "__main__":
    main(*sys.argv[1:])
