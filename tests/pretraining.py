"""Runs of `pretrain_et.py` on ranks that have imported Megatron already.

Starting Python anew on two ranks costs twenty seconds; tests of launchers do it all the same.
"""

import contextlib
import io
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.distributed import ROOT, run_ranks


def start(
    flags: Sequence[object],
    of_rank: Mapping[int, Sequence[object]] | None = None,
    delay: Mapping[int, float] | None = None,
) -> tuple[int, str]:
    """Run the script on a rank, and return its exit code and stderr.

    `of_rank` are further flags of some ranks, `delay` the seconds that some ranks start late.
    """
    rank = int(os.environ["RANK"])
    time.sleep((delay or {}).get(rank, 0))
    more = (of_rank or {}).get(rank, ())
    sys.argv = [str(ROOT / "pretrain_et.py"), *map(str, flags), *map(str, more)]
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    return int(code or 0), stderr.getvalue()


def train(flags: Sequence[object], ranks: int = 2) -> None:
    """Run the script on a number of ranks until it ends.

    Data are read in the ranks themselves: from a forked one no loader's worker can be started.
    """
    ended = run_ranks(start, ranks, ["--num-workers", "0", *flags], timeout=240)
    assert [code for code, _ in ended] == [0] * ranks, ended
