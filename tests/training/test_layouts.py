"""Tests that the same seed and data give the same losses and thresholds on every layout.

Each layout trains with `pretrain_et.py` on real ranks, and is compared with one rank; runs also go
from one layout to another in the middle.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ext.moe.thresholds import Thresholds
from tests.distributed import ROOT
from tests.megatron import TINY
from tests.training.layout_table import HEADER, row, start_flags
from tests.training.layouts import (
    CP2,
    EP2,
    KINDS,
    LAYOUTS,
    ONE_RANK,
    PP2,
    SHARDED,
    STEPS,
    TP2,
    WARMUP,
    WHOLE_EXPERTS,
    Layout,
    difference,
    holds,
    train,
)

SAVED, WATCHED = 12, 16


Trained = Callable[[Layout], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the rows of an undisturbed run; each layout is trained once.

    Runs that other runs resume have checkpoints of steps WARMUP and SAVED.
    """
    sources = [replace(layout, name="") for layout, _ in GOING_ON]

    @cache
    def run(layout: Layout) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("run")
        start = start_flags(layout, lambda kind: of(ONE_RANK[kind])[0])
        interval = ("--save-interval", str(gcd(WARMUP, SAVED)))
        save = layout in sources
        return folder, train(folder, layout, *interval, *start, save=save)

    def of(layout: Layout) -> tuple[Path, list[Any]]:
        return run(replace(layout, name=""))

    return of


@pytest.mark.slow
def test_layout_reference_learns_and_uses_its_capacity(trained: Trained) -> None:
    _, rows = trained(ONE_RANK["fp32"])
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    saturations = [r["moe/layer_01/saturation"] + r["moe/layer_01/starvation"] for r in rows]
    assert max(saturations[WARMUP:]) > 0
    for r in rows:
        assert sum(r["moe/layer_01/fan_out_histogram"]) == 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}: {layout.name}")
def test_layout_trains_as_one_rank_does(layout: Layout, trained: Trained) -> None:
    _, expected = trained(ONE_RANK[layout.kind])
    _, rows = trained(layout)
    result = difference(rows, expected)
    assert holds(result, layout), result


def test_the_table_in_the_documentation_is_of_these_layouts() -> None:
    page = (ROOT / "docs/experiments/layouts.md").read_text()
    sections = page.split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == [k.title for k in KINDS.values()]
    for section, (key, kind) in zip(sections, KINDS.items()):
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        table = [line.strip("|").split("|") for line in lines]
        cells = [[cell.strip() for cell in line] for line in table]
        assert cells[0] == HEADER
        rows = [row(layout, []) for layout in LAYOUTS if layout.kind == key]
        assert [line[:3] for line in cells[2:]] == rows
        for line in cells[2:]:
            assert float(line[3]) <= kind.loss, line
            assert float(line[4]) <= kind.rest, line
            assert line[5] == "equal" or kind.counts_may, line
            assert line[6:] == ["yes", "yes"], line


# Going from one layout to another

TWO_RANKS = [
    ONE_RANK["fp32"],
    Layout("TP 2", 2, 1, TP2),
    Layout("PP 2", 2, 1, PP2),
    Layout("EP 2", 2, 2, EP2),
    Layout("DP 2 distributed optimizer", 2, 2, SHARDED),
]
BF16 = [
    Layout("bf16 EP 2", 2, 2, EP2, kind="bf16"),
    Layout("bf16 DP 2 distributed optimizer", 2, 2, SHARDED, kind="bf16"),
]
FOUR_RANKS = [
    Layout("TP 2 EP 2 DP 2", 4, 2, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED)),
    Layout("PP 2 CP 2", 4, 1, (*PP2, *CP2)),
]
GOING_ON = [
    *((source, [t for t in TWO_RANKS if t != source]) for source in TWO_RANKS),
    *((source, [t for t in BF16 if t != source]) for source in BF16),
    (FOUR_RANKS[0], FOUR_RANKS[1:]),
]


def saved_thresholds(run: Path) -> dict[str, list[float]]:
    """Return the thresholds of each layer in a run's checkpoint, by their names in a row."""
    folder = run / "checkpoints" / f"iter_{SAVED:07d}"
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name in metadata if ".thresholds." in name]
    state = {
        name: torch.zeros(metadata[name].size, dtype=metadata[name].properties.dtype)  # type: ignore[union-attr]
        for name in names
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    decay = float(TINY[TINY.index("--et-ema-decay") + 1])
    values = {}
    for name in names:
        if name.endswith(".average"):
            layer = name.split(".")[2]
            thresholds = Thresholds(len(state[name]), decay)
            prefix = name.removesuffix("average")
            thresholds.load_state_dict({key: state[prefix + key] for key in ("average", "updates")})
            values[f"moe/layer_{int(layer):02d}/experts/threshold"] = thresholds.value().tolist()
    return values


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "source, targets",
    GOING_ON,
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_layout_resumes_from_every_other_layout(
    source: Layout, targets: list[Layout], trained: Trained, tmp_path: Path
) -> None:
    _, undisturbed = trained(ONE_RANK[source.kind])
    folder, _ = trained(source)
    load = ("--load", str(folder / "checkpoints"), "--ckpt-step", str(SAVED))
    thresholds = saved_thresholds(folder)
    assert len(thresholds) == 3
    for number, target in enumerate(targets):
        until = ("--exit-interval", str(WATCHED))
        rows = train(tmp_path / str(number), target, *load, *until)
        assert {key: rows[0][key] for key in thresholds} == thresholds, target.name
        result = difference(rows, undisturbed[SAVED:WATCHED])
        assert holds(result, target), (target.name, result)


@pytest.mark.slow
def test_filters_resume_on_other_layouts(tmp_path: Path) -> None:
    adaptive = ("--et-threshold-estimator", "adaptive")
    one, *others = TWO_RANKS
    interval = ("--save-interval", str(SAVED))
    expected = train(tmp_path / "one", one, *adaptive, *interval, save=True)
    load = ("--load", str(tmp_path / "one" / "checkpoints"), "--ckpt-step", str(SAVED))
    keys = [f"moe/layer_{layer:02d}/experts/threshold" for layer in (1, 2, 3)]
    for number, target in enumerate(others):
        until = ("--exit-interval", str(WATCHED))
        rows = train(tmp_path / str(number), target, *adaptive, *load, *until)
        assert [rows[0][key] for key in keys] == [expected[SAVED][key] for key in keys], target.name
        result = difference(rows, expected[SAVED:WATCHED])
        assert holds(result, target), (target.name, result)


@pytest.mark.slow
def test_resume_refuses_state_that_cannot_be_resharded(tmp_path: Path) -> None:
    from megatron_ext.errors import UserError

    sharded = TWO_RANKS[-1]
    plain = "--no-dist-ckpt-optim-fully-reshardable"
    train(tmp_path / "source", sharded, "--exit-interval", "2", plain, save=True)
    load = ("--load", str(tmp_path / "source" / "checkpoints"), "--exit-interval", "4")
    rows = train(tmp_path / "same", sharded, *load)
    assert [r["step"] for r in rows] == [3, 4]
    with pytest.raises(UserError, match="Save it once more from there without that flag"):
        train(tmp_path / "other", Layout("TP 2", 2, 1, (*TP2, *SHARDED)), *load)
    with pytest.raises(UserError, match="trained with bf16 = False, but the flags say True"):
        train(tmp_path / "bf16", sharded, *load, "--bf16")
    rows = train(tmp_path / "anew", Layout("TP 2", 2, 1, TP2), *load, "--no-load-optim")
    assert [r["step"] for r in rows] == [3, 4]
