"""Tests that a model with Gated DeltaNet layers trains alike on every layout, and resumes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.megatron import DELTA_NET
from tests.training.layouts import (
    CP2,
    EP2,
    FULL,
    INTERLEAVED,
    ONE_RANK,
    OVERLAP,
    PP2,
    SHARDED,
    STEPS,
    TP2,
    WHOLE_EXPERTS,
    Layout,
    difference,
    train,
)

# Weights with which the Gated DeltaNet layers matter, and a rate at which Adam does not amplify
# the rounding of their smallest gradients.
HYBRID = (
    *("--hybrid-layer-pattern", "G-*EGE*E", *DELTA_NET),
    *("--init-method-std", "0.1", "--lr", "3e-3"),
)
SAVED = 12
ALONE = ONE_RANK["fp32"]
LAYOUTS = [
    Layout("DP 2, distributed optimizer", 2, 2, (*SHARDED, *OVERLAP)),
    Layout("EP 2", 2, 2, EP2),
    Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED)),
    Layout("CP 2", 2, 1, CP2),
    Layout("CP 2, TP 2, EP 2", 4, 1, (*CP2, *TP2, *EP2)),
    Layout("PP 2", 2, 1, PP2),
    Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED)),
    Layout("full recomputation", 1, 1, (*FULL, "--recompute-num-layers", "1")),
]  # fmt: skip

# Scales of norms are summed over the ranks that share heads or tokens.
CASES = [
    *(("", layout) for layout in LAYOUTS),
    *(
        ("--et-norm-scale", layout)
        for layout in LAYOUTS
        if "TP" in layout.name or "CP" in layout.name
    ),
]

Trained = Callable[[Layout, str], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the rows of a run, which has a checkpoint of step SAVED."""

    @cache
    def run(layout: Layout, flags: str = "") -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("run")
        interval = ("--save-interval", str(SAVED))
        return folder, train(folder, layout, *HYBRID, *flags.split(), *interval, save=True)

    return run


@pytest.mark.slow
def test_hybrid_model_learns_and_depends_on_its_gated_delta_net_layers(trained: Trained) -> None:
    _, rows = trained(ALONE, "")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    _, other = trained(ALONE, "--linear-conv-kernel-dim 2")
    assert difference(other, rows).loss > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("flags, layout", CASES, ids=lambda value: getattr(value, "name", value))
def test_hybrid_model_trains_as_on_one_rank(layout: Layout, flags: str, trained: Trained) -> None:
    _, expected = trained(ALONE, flags)
    _, rows = trained(layout, flags)
    result = difference(rows, expected)
    assert result.loss <= 1e-5 and result.rest <= 1e-4 and result.counts, result


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target",
    [(ALONE, LAYOUTS[2]), (LAYOUTS[2], LAYOUTS[5]), (LAYOUTS[5], LAYOUTS[3]), (LAYOUTS[4], ALONE)],
    ids=lambda layout: layout.name,
)
def test_hybrid_model_resumes_on_another_layout(
    source: Layout, target: Layout, trained: Trained, tmp_path: Path
) -> None:
    _, undisturbed = trained(ALONE, "")
    folder, _ = trained(source, "")
    load = ("--load", str(folder / "checkpoints"), "--ckpt-step", str(SAVED))
    rows = train(tmp_path, target, *HYBRID, *load, "--exit-interval", str(SAVED + 4))
    result = difference(rows, undisturbed[SAVED : SAVED + 4])
    assert result.loss <= 1e-5 and result.rest <= 1e-4 and result.counts, result
