"""The rows of the comparison."""

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
        pools: for expert choice, how many a step's tokens make; else 0.
    """

    name: str
    label: str
    router: str | None = None
    pools: int = 0

    @property
    def trained_as(self) -> str | None:
        """What the routing of its training is called by tools.validation_loss, if it is not that
        of the model itself."""
        if self.pools:
            return "ec"
        return "et-capacity" if self.name.startswith("et") else None

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
    Row("ec-quarter", "expert choice, pools of a quarter step", "ec-2k", pools=4),
    Row("ec-step", "expert choice, pools of a step", "ec-2k", pools=1),
    Row("et-cold", "expert threshold", "et-cold"),
    Row("et", "expert threshold, warm-up"),
)
ROWS = {row.name: row for row in _ROWS}
# What others are compared with, seed by seed.
REFERENCES = ("tc", "tc-aux", "tc-loss-free")
