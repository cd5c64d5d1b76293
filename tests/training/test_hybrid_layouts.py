"""Tests that models with recurrent layers learn, and resume on every layout.

`test_layouts.py` compares its layouts with one rank.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.training.layouts import ONE_RANK, STEPS, Layout, difference, holds, layouts_of, train

SAVED = 12
ALONE = ONE_RANK["hybrid"]
LAYOUTS = layouts_of("hybrid")
# Scales of norms are summed over the ranks that share heads or tokens.
SHARING = [layout for name, layout in LAYOUTS.items() if "TP" in name or "CP" in name]

Trained = Callable[[Layout, str], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the rows of a run, which has a checkpoint of step SAVED."""

    @cache
    def run(layout: Layout, flags: str = "") -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("run")
        interval = ("--save-interval", str(SAVED))
        return folder, train(folder, layout, *flags.split(), *interval, save=True)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, flags", [("hybrid", "--linear-conv-kernel-dim 2"), ("mamba", "--mamba-num-groups 4")]
)
def test_hybrid_model_learns_and_depends_on_its_recurrent_layers(
    kind: str, flags: str, trained: Trained
) -> None:
    _, rows = trained(ONE_RANK[kind], "")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    _, other = trained(ONE_RANK[kind], flags)
    assert difference(other, rows).loss > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", SHARING, ids=lambda layout: layout.name)
def test_norm_scales_of_a_hybrid_model_train_as_on_one_rank(
    layout: Layout, trained: Trained
) -> None:
    _, expected = trained(ALONE, "--et-norm-scale")
    _, rows = trained(layout, "--et-norm-scale")
    result = difference(rows, expected)
    assert holds(result, layout), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target",
    [
        ("one rank", "TP 2, EP 2"),
        ("TP 2, EP 2", "PP 2"),
        ("PP 2", "CP 2"),
        ("CP 2, TP 2, EP 2", "one rank"),
    ],
)
@pytest.mark.parametrize("kind", ["hybrid", "mamba"])
def test_hybrid_model_resumes_on_another_layout(
    kind: str, source: str, target: str, trained: Trained, tmp_path: Path
) -> None:
    layouts = layouts_of(kind) | {"one rank": ONE_RANK[kind]}
    _, undisturbed = trained(ONE_RANK[kind], "")
    folder, _ = trained(layouts[source], "")
    load = ("--load", str(folder / "checkpoints"), "--ckpt-step", str(SAVED))
    rows = train(tmp_path, layouts[target], *load, "--exit-interval", str(SAVED + 4))
    result = difference(rows, undisturbed[SAVED : SAVED + 4])
    assert holds(result, layouts[target]), result
