"""Tests of the comparison in miniature: its table by hand, and real trainings."""

import json
import re
import shutil
import statistics
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from examples.miniature.rows import ROWS
from examples.miniature.table import smallest_difference, write_table
from examples.quickstart.prepare_text import clean_news, news
from megatron_ext.errors import UserError
from tests.distributed import ROOT
from tests.examples.test_quickstart import has_texts
from tests.reports.metric_rows import training_row, write_run
from tests.warm import warm_python

SETTINGS = {"optimizer": "adamw", "flags": [], "recipes": "0"}
LOSSES = {"dense": [5.0, 5.2, 5.1], "tc-aux": [4.9, 5.0, 4.7], "et": [4.8, 4.7, 4.75]}


def make_runs(output: Path, seeds: list[int]) -> None:
    for name, losses in LOSSES.items():
        layers = () if name == "dense" else (1, 2)
        for seed, loss in zip(seeds, losses):
            rows = [training_row(step, layers=layers) for step in range(1, 21)]
            run = write_run(output / f"{name}-seed{seed}", [*rows, {"step": 20, "val_loss": loss}])
            routings = [{"loss": loss}, {"loss": loss - 0.01}][: 2 if name == "et" else 1]
            (run / "validation.json").write_text(json.dumps({"routings": routings}))
            settings = {"seed": seed, "global_batch_size": 8, "seq_length": 16, "row": name}
            (run / "run.json").write_text(json.dumps({"settings": settings}))


def test_table_differences_are_paired_by_seed(tmp_path: Path) -> None:
    seeds = [3, 5, 9]
    make_runs(tmp_path, seeds)
    table = write_table(tmp_path, [ROWS[name] for name in LOSSES], seeds, SETTINGS)
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    differences = [ours - theirs for ours, theirs in zip(LOSSES["et"], LOSSES["tc-aux"])]
    result = results["et"]["difference"]["tc-aux"]
    assert result["mean"] == pytest.approx(statistics.mean(differences))
    error = statistics.stdev(differences) / 3**0.5
    assert result["half_width"] == pytest.approx(4.302653 * error)  # of the t distribution, 2 free
    assert list(results["tc-aux"]["difference"]) == []
    assert results["et"]["seeds"]["5"]["loss"] == 4.7
    assert table.splitlines()[0].startswith(
        "|  | seeds | validation loss | − token choice, auxiliary loss |"
    )
    [row] = [line for line in table.splitlines() if "warm-up" in line]
    assert row.startswith(
        "| expert threshold, warm-up | 3, 5, 9 | 4.7500 ± 0.0500 | -0.1167 ± 0.4362 | +0.0100 |"
    )
    [dense] = [line for line in table.splitlines() if line.startswith("| dense")]
    assert [cell.strip() for cell in dense.split("|")[5:7]] == ["", ""]  # no gap, no load
    assert table in (tmp_path / "table.md").read_text()
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_table_of_one_seed_has_no_spread(tmp_path: Path) -> None:
    make_runs(tmp_path, [1])
    table = write_table(tmp_path, [ROWS[name] for name in LOSSES], [1], SETTINGS)
    assert "±" not in table
    assert "| -0.1000 |" in table


def test_smallest_difference_is_that_of_a_two_way_layout() -> None:
    rows = [dict(zip("abc", ({"loss": loss} for loss in row))) for row in LOSSES.values()]
    # For two rows it is the interval of their paired differences.
    difference = np.subtract(LOSSES["dense"], LOSSES["tc-aux"])
    interval = stats.ttest_1samp(difference, 0.0).confidence_interval()
    half_width = (interval.high - interval.low) / 2
    assert smallest_difference(rows[:2]) == pytest.approx(half_width)
    # For three it follows from the residuals of a linear model with a constant per row and seed.
    design = np.array(
        [[*np.eye(3)[row], *np.eye(3)[seed]] for row in range(3) for seed in range(3)]
    )
    losses = np.array(list(LOSSES.values())).flatten()
    residuals = losses - design @ np.linalg.lstsq(design, losses)[0]
    error = (residuals @ residuals / 4 * 2 / 3) ** 0.5
    expected = error * 2.776445  # of the t distribution with 4 degrees of freedom
    assert smallest_difference(rows) == pytest.approx(expected)
    # A row without all seeds does not count.
    assert smallest_difference([*rows, {"a": {"loss": 9.0}}]) == pytest.approx(expected)
    assert smallest_difference(rows[:1]) is None
    assert smallest_difference([{"a": row["a"]} for row in rows]) is None
    assert smallest_difference([]) is None


def test_table_leaves_out_runs_that_failed(tmp_path: Path) -> None:
    make_runs(tmp_path, [3, 5])
    shutil.rmtree(tmp_path / "et-seed3")
    rows = [ROWS[name] for name in LOSSES]
    table = write_table(tmp_path, rows, [3, 5], SETTINGS, failed={"et-seed3"})
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(results["et"]["seeds"]) == ["5"]
    assert results["et"]["difference"]["tc-aux"]["seeds"] == [5]
    assert "| expert threshold, warm-up | 5 | 4.7000 | -0.3000 |" in table
    assert (tmp_path / "differences.png").stat().st_size > 10_000


def test_results_of_other_machines_belong_to_the_table(tmp_path: Path) -> None:
    rows = [ROWS[name] for name in LOSSES]
    together, first, second = (tmp_path / name for name in ("together", "first", "second"))
    make_runs(together, [3, 5, 9])
    expected = write_table(together, rows, [3, 5, 9], SETTINGS)
    make_runs(first, [3, 5, 9])
    write_table(first, rows, [3, 5], SETTINGS)
    second.mkdir()
    (second / "results.json").write_text((first / "results.json").read_text())
    shutil.copytree(first / "et-seed9", second / "et-seed9")
    write_table(second, [ROWS["et"]], [9], SETTINGS)
    results = json.loads((second / "results.json").read_text())["rows"]
    assert results["et"]["difference"]["tc-aux"]["seeds"] == [3, 5]  # which both rows have
    for name in ("dense-seed9", "tc-aux-seed9"):
        shutil.copytree(first / name, second / name)
    assert write_table(second, rows, [9], SETTINGS) == expected


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    make_runs(tmp_path, [1])
    rows = [ROWS[name] for name in LOSSES]
    write_table(tmp_path, rows, [1], SETTINGS)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match="has results of other settings"):
        write_table(tmp_path, rows, [1], SETTINGS | {"optimizer": "muon"})
    assert (tmp_path / "results.json").read_bytes() == before


def test_fan_out_and_forced_tokens_by_hand(tmp_path: Path) -> None:
    run_folder = tmp_path / "et-seed1"
    rows = []
    for step in range(1, 91):  # thresholds from step 11 on: windows of 1.0, 0.9, 1.2 and 1.02
        row = training_row(step)
        window = (step - 11) // 20
        for layer, part in ((1, 0.5), (2, 1.5)):  # of which the mean is 1
            fan_out = 5 if step <= 10 else 2 * (1.0, 0.9, 1.2, 1.02)[window]
            row[f"moe/layer_{layer:02d}/fan_out"] = part * fan_out
            row[f"moe/layer_{layer:02d}/starvation"] = 0.9 if step <= 50 else 0.002 * (step > 70)
        rows.append(row)
    write_run(run_folder, [*rows, {"step": 90, "val_loss": 4.0}])
    settings = {"router_type": "expert-threshold", "num_experts": 4, "et_warmup_iters": 10}
    settings |= {"moe_router_topk": 2, "seed": 1, "global_batch_size": 8, "seq_length": 16}
    (run_folder / "run.json").write_text(json.dumps({"settings": settings}))
    layers = {"1": {"fan_out": 1.9}, "2": {"fan_out": 2.02}}
    routings = [{"loss": 4.0, "layers": layers}, {"loss": 4.0}]
    (run_folder / "validation.json").write_text(json.dumps({"routings": routings}))
    write_table(tmp_path, [ROWS["et"]], [1], SETTINGS)
    compute = json.loads((tmp_path / "results.json").read_text())["rows"]["et"]["seeds"]["1"][
        "compute"
    ]
    assert compute["windows"] == pytest.approx([1.0, 0.9, 1.2, 1.02])
    assert compute["held_out"] == pytest.approx([0.95, 1.01])
    assert compute["forced"] == pytest.approx(0.001)
    assert compute["forced_windows"] == pytest.approx([0.0, 0.002])
    line = "| expert threshold, warm-up | 0.90, 1.20 | 2 of 4 | 0.10%, 0.2% | 0.980, 0.950 |"
    assert line in (tmp_path / "table.md").read_text().splitlines()


def miniature(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [warm_python(), "-m", "examples.miniature", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def few_texts(folder: Path) -> str:
    """Write a part of the text, of which everything is predicted thrice; return the file."""
    text = folder / "few.jsonl"
    lines = [json.dumps({"text": clean_news(one)}) for one in islice(news(), 400)]
    text.write_text("\n".join(lines))
    return str(text)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_texts(), reason="the packages with the text are missing")
def test_miniature_trains_rows_once_and_compares_them(tmp_path: Path) -> None:
    short = ("--", "--train-iters", "6", "--et-warmup-iters", "2", "--eval-iters", "1")
    shape = ("--output", str(tmp_path), "--ranks", "1", "--text", few_texts(tmp_path))
    first = miniature(*shape, "--rows", "et", *short)
    assert first.returncode == 0, first.stderr
    both = miniature(*shape, "--rows", "tc-aux", "et", *short)
    assert both.returncode == 0, both.stderr
    assert re.search(r"\] et-seed1: done before, reused", both.stdout)
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    difference = results["et"]["difference"]["tc-aux"]["mean"]
    losses = [results[name]["seeds"]["1"]["loss"] for name in ("et", "tc-aux")]
    assert difference == pytest.approx(losses[0] - losses[1])
    assert 5 < losses[0] < 9
    assert results["et"]["seeds"]["1"]["gap"] is not None
    assert results["tc-aux"]["seeds"]["1"]["gap"] is None
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_texts(), reason="the packages with the text are missing")
def test_miniature_compares_the_rows_that_do_not_diverge(tmp_path: Path) -> None:
    shape = ("--output", str(tmp_path), "--ranks", "1", "--text", few_texts(tmp_path))
    flags = ("--train-iters", "3", "--eval-iters", "1")
    diverging = (*flags, "--moe-router-topk-scaling-factor", "1e38")  # without experts no effect
    done = miniature(*shape, "--rows", "tc-aux", "dense", "--", *diverging)
    assert done.returncode == 2
    assert re.search(
        r"miniature: 1 of 2 runs failed: tc-aux-seed1\. The message of the first: pretrain_et\.py: "
        r"the loss or a gradient of step 2 is not a finite number\.",
        done.stderr,
    )
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == ["dense"]


def test_miniature_refuses_wrong_flags_in_one_sentence(tmp_path: Path) -> None:
    for words, message in (
        (("--seeds", "1", "1"), "--seeds repeats a value. Name each once."),
        (("--ranks", "0"), "--ranks 0 is too small. Choose at least 1."),
        (("--rows", "xy"), "--rows xy is not one of"),
        (("--text", str(tmp_path / "x.txt")), f"--text {tmp_path / 'x.txt'} does not exist."),
    ):
        done = miniature("--output", str(tmp_path / "none"), *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()
