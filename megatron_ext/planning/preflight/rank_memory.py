"""Dry run in a child process of a preflight."""

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_ext.devices import activate
from megatron_ext.errors import UserError

GIB = 2**30


class DryRun:
    """Dry run in a child process, which simulates other ranks and uses no GPU.

    Create it before anything of Megatron is imported and before CUDA is used, because neither
    works after a fork.

    Args:
        flags: Flags of `pretrain_et.py`.
        ranks: World size of the run.
    """

    def __init__(self, flags: Sequence[str], ranks: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, child_end = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_measure, args=(child_end, [*flags, "--dry-run", str(ranks)]), daemon=True
        )
        self._process.start()
        child_end.close()

    def facts(self, timeout: float) -> dict[str, Any]:
        """Wait for the dry run and return the facts that `--dry-run` prints as JSON.

        Args:
            timeout: Seconds to wait.

        Raises:
            UserError: The flags are wrong, or the dry run does not end in time.
        """
        try:
            if not self._pipe.poll(timeout):
                raise UserError(
                    f"--dry-run does not end within {timeout:g} s. Raise --stall-timeout."
                )
            outcome, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"--dry-run ended with exit code {self._process.exitcode}. Check "
                "whether the memory of the host ran out."
            ) from None
        finally:
            self.stop()
        if outcome == "refused":
            raise UserError(value)
        assert outcome == "measured", value
        return value

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()


def _measure(pipe: Connection, flags: list[str]) -> None:
    """Measure a dry run in this process, and send the outcome through a pipe."""
    with open(os.devnull, "w") as nowhere:  # the preflight itself prints warnings
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        activate(use_cuda=False)
        from megatron_ext.arguments import parse_args
        from megatron_ext.planning.dry_run import measure

        pipe.send(("measured", measure(*parse_args(flags))))
    except UserError as error:
        pipe.send(("refused", str(error)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def memory_of_a_rank(facts: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes on a rank of the pipeline stage that needs most, and the stage's number."""
    sizes = [sum(stage["memory"].values()) for stage in facts["stages"]]
    return max(sizes), sizes.index(max(sizes))
