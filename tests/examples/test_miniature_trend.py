"""Tests of the trend of the miniature's differences with size, against other formulas."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from examples.miniature.trend import SIZES, Comparison, Trend, main, read_comparison, sizes_of
from examples.quickstart.training import RECIPES
from megatron_ext.errors import UserError
from tests.distributed import ROOT

SMALL = sizes_of(RECIPES / "miniature.yaml")


def compared(differences: Sequence[float], text: str = "", **factors: float) -> Comparison:
    sizes = {name: SMALL[name] * factors.get(name.replace(" ", "_"), 1.0) for name in SIZES}
    return Comparison(("adamw", "0"), text, sizes, differences)


def write_results(
    folder: Path, flags: Sequence[str], losses: dict[str, dict[str, float]], **settings: Any
) -> str:
    rows = {
        row: {"seeds": {seed: {"loss": loss} for seed, loss in by_seed.items()}}
        for row, by_seed in losses.items()
    }
    common = {"optimizer": "adamw", "recipes": "0", "flags": flags, **settings}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"settings": common, "rows": rows}))
    return str(folder)


def test_two_folders_give_the_interval_of_a_two_sample_test() -> None:
    few, many = [-0.004, -0.011, -0.006], [-0.021, -0.012, -0.018]
    trend = Trend([compared(few), compared(many, tokens=4.0)])
    expected = stats.ttest_ind(many, few).confidence_interval()
    change = trend.per_doubling("tokens")
    assert trend.varied == ["tokens"]
    assert change.value == pytest.approx((np.mean(many) - np.mean(few)) / 2)
    assert change.half_width == pytest.approx((expected.high - expected.low) / 2 / 2)
    assert trend.at(SMALL).value == pytest.approx(np.mean(few))
    assert str(change) == f"{change.value:+.4f} ± {change.half_width:.4f}"


def test_one_size_gives_the_regression_of_scipy() -> None:
    draw = np.random.default_rng(0)
    widths = [1, 2, 3, 8]
    comparisons = [compared(list(draw.normal(size=2)), width=width) for width in widths]
    trend = Trend(comparisons)
    logs = np.repeat(np.log2(widths), 2)
    line = stats.linregress(logs, np.concatenate([one.differences for one in comparisons]))
    quantile = stats.t.ppf(0.975, 6)
    assert trend.per_doubling("width").value == pytest.approx(line.slope)
    assert trend.per_doubling("width").half_width == pytest.approx(quantile * line.stderr)
    assert trend.at(SMALL).value == pytest.approx(line.intercept)
    assert trend.at(SMALL).half_width == pytest.approx(quantile * line.intercept_stderr)


def test_intervals_contain_the_true_values_95_times_in_100() -> None:
    """Also where sizes and texts vary together, and far from the folders."""
    slopes, constants = {"tokens": -0.01, "tokens of a step": 0.02, "width": 0.003}, (-0.1, 0.4)
    # Steps four times as many, batches four times as large, and a second text.
    kinds = [
        ("", {}), ("", {"width": 2.0}), ("b", {}), ("b", {"tokens": 4.0}),
        ("b", {"tokens": 4.0, "tokens_of_a_step": 4.0}),
    ]  # fmt: skip
    far = {**SMALL, "tokens": SMALL["tokens"] * 4096, "width": SMALL["width"] * 6}
    right = constants[0] + 12 * slopes["tokens"] + math.log2(6) * slopes["width"]
    draw = np.random.default_rng(1)
    hits = np.zeros(2)
    for _ in range(2000):
        comparisons = [compared([], text, **factors) for text, factors in kinds]
        comparisons = [
            Comparison(
                one.trained_with, one.text, one.sizes,
                list(
                    constants[one.text == "b"]
                    + sum(s * math.log2(one.sizes[n] / SMALL[n]) for n, s in slopes.items())
                    + draw.normal(scale=0.01, size=3)
                ),
            )
            for one in comparisons
        ]  # fmt: skip
        trend = Trend(comparisons)
        step, there = trend.per_doubling("tokens of a step"), trend.at(far)
        hits += [
            abs(step.value - slopes["tokens of a step"]) < step.half_width,
            abs(there.value - right) < there.half_width,
        ]
    assert np.abs(hits / 2000 - 0.95).max() < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_sizes_follow_from_recipe_and_flags() -> None:
    flags = ["--train-iters", "4800", "--global-batch-size=32", "--lr", "1e-3"]
    assert sizes_of(RECIPES / "miniature.yaml", flags) == {
        "tokens": 4800 * 32 * 256, "tokens of a step": 32 * 256, "layers": 4, "width": 128,
        "routed experts": 16, "routed experts per token": 1,
    }  # fmt: skip
    d12 = sizes_of(RECIPES / "d12.yaml")
    assert d12["tokens"] == 19073 * 524_288 and d12["width"] == 768 and d12["layers"] == 12


def test_prediction_follows_the_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = {"et": {"1": 3.9, "2": 3.8}, "dense": {"1": 4.0, "2": 3.9, "3": 1.0}}
    wide = {"et": {"1": 3.6, "2": 3.7}, "dense": {"1": 3.75, "2": 3.75}}
    folders = [
        write_results(tmp_path / "here", [], here),
        write_results(tmp_path / "wide", ["--hidden-size", "256"], wide),
    ]
    main([*folders, "--row", "et", "--against", "dense", "--predict", "d12"])
    output = capsys.readouterr().out
    # The mean differences are -0.1 and -0.1; width 768 is log2(6) doublings.
    assert re.search(r"\| width \| 128 \| 256 \| [+-]0\.0000 ± 0\.2151 \|", output)
    assert "Extrapolated to d12 (width × 6), it is -0.1000 ±" in output


def test_recorded_results_are_read(tmp_path: Path) -> None:
    recorded = ROOT / "docs" / "experiments" / "miniature.json"
    shutil.copy(recorded, tmp_path / "results.json")
    comparison = read_comparison(tmp_path, "et-adaptive", "dense")
    assert comparison.sizes == SMALL
    # The means of the page's table are 3.8802 and 3.8952.
    assert np.mean(comparison.differences) == pytest.approx(-0.0150, abs=1e-4)


def test_folders_that_do_not_determine_the_fit_are_refused(tmp_path: Path) -> None:
    two, few = [0.1, 0.2], [0.1]
    with pytest.raises(UserError, match="do not separate the effects of tokens, tokens of a step"):
        Trend([compared(two), compared(two, tokens=4.0, tokens_of_a_step=4.0)])
    with pytest.raises(UserError, match="width and the texts"):
        Trend([compared(two), compared(two, text="b", width=2.0)])
    with pytest.raises(UserError, match="too few seeds"):
        Trend([compared(few), compared(few, width=2.0)])
    with pytest.raises(UserError, match="differ in the optimizer"):
        Trend([compared(two), Comparison(("muon", "0"), "", SMALL, two)])
    with pytest.raises(UserError, match=r"results.json cannot be read. Give a folder"):
        read_comparison(tmp_path, "et", "dense")
    folder = write_results(tmp_path / "runs", [], {"et": {"1": 3.0}, "dense": {"2": 3.0}})
    with pytest.raises(UserError, match="has no seed of both et and dense"):
        read_comparison(Path(folder), "et", "dense")
    with pytest.raises(UserError, match="the same row"):
        main([folder, "--row", "et", "--against", "et"])
