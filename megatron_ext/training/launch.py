"""Communication of the ranks of a launch through a key-value store, without collectives.

The store is the one that torchrun, or rank 0, serves at MASTER_ADDR:MASTER_PORT. It works before
there is a process group and while collectives hang, so a rank that is late, was started with other
flags or failed a check is named on all ranks.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ext.errors import UserError


class Launch:
    """Ranks that were started together.

    Attributes:
        store: Store that all ranks share, None if there is one rank. Its keys belong to this
            attempt of torchrun alone.
        rank: Rank of this process.
        size: Number of ranks.
        timeout: Seconds to wait for any other rank.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int, timeout: float) -> None:
        """Create a launch of known ranks; use :meth:`join` to connect to one."""
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout

    @classmethod
    def join(cls, rank: int, size: int, timeout: float) -> "Launch":
        """Connect to the store of this launch.

        Args:
            rank: Rank of this process.
            size: Number of ranks.
            timeout: Seconds to wait for any other rank.

        Raises:
            UserError: The store does not answer in time.
        """
        if size == 1:
            return cls(None, 0, 1, timeout)
        try:
            store, _, _ = next(
                dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout))
            )
        except ValueError as error:  # a variable of the environment is missing
            raise UserError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR or MASTER_PORT is not set. Start the ranks "
                "with torchrun."
            ) from error
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"Rank {rank} cannot reach the launch's store at {address} within {timeout:g} s. "
                "Check that rank 0 was started and that the address is right."
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"launch/{attempt}", store), rank, size, timeout)

    def agree(self, topic: str, check: Callable[[], None]) -> None:
        """Continue only if `check` raises no UserError on any rank.

        Args:
            topic: Name of the check, used once, and in the same order on every rank.
            check: Check of this rank, which may be a different function on each rank.

        Raises:
            UserError: A check failed or a rank did not answer in time. Every rank raises the error
                of the first failing rank, or one that names the silent ranks.
        """
        problem = None
        try:
            check()
        except UserError as error:
            problem = str(error)
        if problem := self.first_problem(topic, problem):
            raise UserError(problem)

    def first_problem(self, topic: str, problem: str | None) -> str | None:
        """Return the problem of the first rank that has one, on every rank; see :meth:`agree`."""
        if self.store is None:
            return problem
        if self.rank == 0:
            problem = self._collect(topic, problem)
            self.store.set(f"{topic}/verdict", problem or "")
            return problem
        self.store.set(f"{topic}/{self.rank}", problem or "")
        return self.wait(f"{topic}/verdict") or None

    def share(self, topic: str, value: Any) -> Any:
        """Return the `value` of rank 0, which must be JSON data, on every rank."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
        return json.loads(self.wait(topic))

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank.

        Args:
            topic: Name of the exchange, used once.
            value: JSON data of this rank.

        Raises:
            UserError: The message names the ranks that do not answer in time.
        """
        if self.store is None:
            return [value]
        self.store.set(f"{topic}/value/{self.rank}", json.dumps(value))
        self.agree(topic, lambda: None)
        values = []
        if self.rank == 0:
            keys = [f"{topic}/value/{rank}" for rank in range(self.size)]
            values = [json.loads(self.store.get(key)) for key in keys]
        return self.share(f"{topic}/values", values)

    def leave(self) -> None:
        """Wait on rank 0, which may serve the store, until all ranks have read the values."""
        if self.store is None:
            return
        if self.rank == 0:
            self._collect("left", None)
        else:
            self.store.set(f"left/{self.rank}", "")

    def _collect(self, topic: str, problem: str | None) -> str | None:
        """Return the first problem that a rank reports, without waiting for the other ranks."""
        assert self.store is not None
        deadline = time.monotonic() + self.timeout
        waiting = set(range(1, self.size))
        while waiting and not problem and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if self.store.check([f"{topic}/{rank}"]):
                    waiting.discard(rank)
                    problem = problem or self.store.get(f"{topic}/{rank}").decode() or None
            if waiting:
                time.sleep(0.02)
        if waiting and not problem:
            late = ", ".join(map(str, sorted(waiting)[:8])) + (", ..." if len(waiting) > 8 else "")
            problem = (
                f"of {self.size} ranks, these were not ready within {self.timeout:g} s "
                f"({topic}): {late}; check what blocks them, or raise --stall-timeout"
            )
        return problem

    def wait(self, key: str) -> str:
        """Wait for a value that another rank sets in the store, and return it.

        Raises:
            UserError: The value is not set in time.
        """
        assert self.store is not None
        try:
            # Rank 0 may itself wait for the whole timeout for another rank.
            self.store.wait([key], timedelta(seconds=2 * self.timeout))
        except dist.DistError as error:
            raise UserError(
                f"Rank {self.rank} received nothing from rank 0 for {2 * self.timeout:g} s. Check "
                "what blocks it, or raise --stall-timeout."
            ) from error
        return self.store.get(key).decode()
