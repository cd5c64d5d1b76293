"""The rows of the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.training import RECIPES


@dataclass(frozen=True)
class Row:
    """One way to route.

    Attributes:
        name: of its folder.
        label: in the table.
        router: a file of examples/recipes/routers, without its ending; none for the recipe's own.
        flags: what the file does not say.
    """

    name: str
    label: str
    router: str | None = None
    flags: Sequence[str] = ()

    @property
    def recipes(self) -> list[Path]:
        return [] if self.router is None else [RECIPES / "routers" / f"{self.router}.yaml"]

    def run(self, seed: int) -> str:
        """The name of a run's folder."""
        return f"{self.name}-seed{seed}"


DENSE = Row("dense", "dense", "dense")
_ROWS = (
    DENSE,
    Row("tc", "token choice, unbalanced", "token-choice"),
    Row("tc-aux", "token choice, auxiliary loss", "token-choice-aux"),
    Row("tc-loss-free", "token choice, loss-free", "token-choice-loss-free"),
    # Two ranks' micro-batches of sequences of 256 tokens.
    Row("ec-512", "expert choice, pool 512", "ec-2k", ("--micro-batch-size", "1")),
    Row("ec-2k", "expert choice, pool 2,048", "ec-2k", ("--micro-batch-size", "4")),
    Row("et-cold", "expert threshold", "et-cold"),
    Row("et", "expert threshold, warm-up"),
)
ROWS = {row.name: row for row in _ROWS}
# What others are compared with, seed by seed.
REFERENCES = ("tc", "tc-aux", "tc-loss-free")
