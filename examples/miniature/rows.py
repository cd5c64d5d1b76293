"""The rows of the comparison."""

from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.training import RECIPES


@dataclass(frozen=True)
class Row:
    """Way to route.

    Attributes:
        name: Name of its folder.
        label: Name in the table.
        router: File of examples/recipes/routers without its suffix; None for the router of the
            recipe.
        pools: Number of pools of a step for expert choice; 0 for other routers.
    """

    name: str
    label: str
    router: str | None = None
    pools: int = 0

    @property
    def trained_as(self) -> str | None:
        """Name in tools.validation_loss of the routing in training, None if it is the model's."""
        if self.pools:
            return "ec"
        return "et-capacity" if self.name.startswith("et") else None

    @property
    def recipes(self) -> list[Path]:
        return [] if self.router is None else [RECIPES / "routers" / f"{self.router}.yaml"]

    def run(self, seed: int) -> str:
        """Return the name of the folder of a run."""
        return f"{self.name}-seed{seed}"


DENSE = Row("dense", "dense", "dense")
_ROWS = (
    DENSE,
    Row("tc", "token choice, unbalanced", "token-choice"),
    Row("tc-aux", "token choice, auxiliary loss", "token-choice-aux"),
    Row("tc-aux-strong", "token choice, strong auxiliary loss", "token-choice-aux-strong"),
    Row("tc-loss-free", "token choice, loss-free", "token-choice-loss-free"),
    Row("tc-quantile", "token choice, quantile balancing", "token-choice-quantile"),
    Row("ec-quarter", "expert choice, pools of a quarter step", "ec-2k", pools=4),
    Row("ec-step", "expert choice, pools of a step", "ec-2k", pools=1),
    Row("et-cold", "expert threshold", "et-cold"),
    Row("et", "expert threshold, warm-up"),
    Row("et-adaptive-cold", "expert threshold, filters", "et-adaptive-cold"),
    Row("et-adaptive", "expert threshold, filters, warm-up", "et-adaptive"),
    Row("ec-no-shared", "expert choice, no shared expert", "ec-no-shared", pools=1),
    Row("et-hybrid", "expert threshold, warm-up, Gated DeltaNet", "et-hybrid"),
    Row("et-no-shared", "expert threshold, warm-up, no shared expert", "et-no-shared"),
)
ROWS = {row.name: row for row in _ROWS}
# Rows with which others are compared, seed by seed.
REFERENCES = ("tc-aux", "tc-aux-strong", "tc-loss-free", "tc-quantile")
