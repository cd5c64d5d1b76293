"""Tests of the comparison of runs: metrics, lengths, seeds, missing columns, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from megatron_ext.errors import UserError
from megatron_ext.reports.comparison.compared_runs import differences, group_runs, read_runs
from megatron_ext.reports.comparison.final_metrics import METRICS, metrics_table
from tests.reports.metric_rows import training_row, write_run
from tools import report

BATCH, LENGTH, WORLD = 8, 16, 4
STEP = BATCH * LENGTH  # tokens
ROW_FLOPS = 6e9  # of a step


def make_run(
    folder: Path,
    steps: int = 40,
    *,
    seed: int = 1,
    layers: tuple[int, ...] = (1, 2),
    rows: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> str:
    """Write a run of the trainer, evaluated every ten steps to a loss of 5 - step / 100."""
    if rows is None:
        rows = []
        for step in range(1, steps + 1):
            row = training_row(step, layers=layers)
            seconds = STEP / row["tokens_per_s"]
            rows.append(row | {"flops_per_s_per_device": ROW_FLOPS / seconds / WORLD})
            if step % 10 == 0:
                rows.append({"step": step, "val_loss": 5 - step / 100 + 0.1 * seed})
    write_run(folder, rows)
    usual: dict[str, Any] = {"seed": seed, "world_size": WORLD}
    usual |= {"global_batch_size": BATCH, "seq_length": LENGTH}
    usual |= {"run_dir": str(folder), "lr": 1e-3, "consumed_train_samples": seed}
    (folder / "run.json").write_text(json.dumps({"settings": usual | settings}))
    return str(folder)


def figure(name: str) -> Any:
    [result] = [f for f in METRICS if f.label.startswith(name)]
    return result.value


def table_of(paths: list[str]) -> dict[str, list[str]]:
    return {label: cells for label, *cells in metrics_table(group_runs(read_runs(paths)))}


def test_final_metrics_match_manual_computation(tmp_path: Path) -> None:
    [run] = read_runs([make_run(tmp_path / "run")])
    assert figure("tokens trained on")(run) == run.tokens == 40 * STEP
    assert figure("final validation")(run) == pytest.approx(5 - 0.4 + 0.1)
    speeds = [training_row(step)["tokens_per_s"] for step in range(1, 41)]
    assert figure("tokens per second")(run) == pytest.approx(np.median(speeds))
    assert figure("FLOPs")(run) == pytest.approx(40 * ROW_FLOPS)
    hours = sum(STEP / speed for speed in speeds) * WORLD / 3600
    assert figure("device-hours")(run) == pytest.approx(hours)
    assert figure("routed experts per token")(run) == 1.0
    assert figure("tokens without")(run) == pytest.approx(30)
    assert figure("busiest expert's load / mean, worst")(run) == pytest.approx(1.2)
    assert figure("threshold drift")(run) == 0.0


def test_threshold_drift_is_measured_over_the_last_tenth(tmp_path: Path) -> None:
    rows = [training_row(step) for step in range(1, 101)]
    for row in rows:
        for layer, slope in ((1, 0.01), (2, -0.03)):
            if (name := f"moe/layer_{layer:02d}/experts/threshold") in row:
                row[name] = [slope * row["step"]] * 4
    [run] = read_runs([make_run(tmp_path / "run", rows=rows)])
    assert figure("threshold drift")(run) == pytest.approx((0.1 + 0.3) / 2)


def test_device_hours_with_a_changing_number_of_devices(tmp_path: Path) -> None:
    """Half of the steps ran on twice as many devices as run.json states, each as fast."""
    rows = [training_row(step) for step in range(1, 41)]
    seconds = 0.0
    for row in rows:
        devices = 2 * WORLD if row["step"] <= 20 else WORLD
        row["flops_per_s_per_device"] = 1e9
        row["tokens_per_s"] = STEP * devices * 1e9 / ROW_FLOPS
        seconds += devices * STEP / row["tokens_per_s"]
    [run] = read_runs([make_run(tmp_path / "run", rows=rows)])
    assert figure("device-hours")(run) == pytest.approx(seconds / 3600)


def recorded_row(step: int, tokens: int, **sizes: Any) -> dict[str, Any]:
    """Return a row that records what its step was trained on."""
    usual = {"seconds": 2.0, "world_size": 4, "batch_size": 8, "seq_length": 16}
    row = training_row(step) | usual | {"flops_per_token": 100.0} | sizes
    seconds = row["seconds"] * row["world_size"]
    size = row["batch_size"] * row["seq_length"]
    return row | {"tokens": tokens, "flops_per_s_per_device": 100.0 * size / seconds}


def test_work_is_read_from_rows_and_not_from_the_last_start(tmp_path: Path) -> None:
    rows = [recorded_row(step, 128 * step) for step in range(1, 5)]
    other = {"world_size": 2, "seq_length": 32, "batch_size": 2, "seconds": 5.0}
    other |= {"flops_per_token": 120.0}
    rows += [recorded_row(step, 512 + 64 * (step - 4), **other) for step in (5, 6)]
    failed: dict[str, Any] = {"world_size": 64, "seq_length": 4096, "global_batch_size": 1024}
    [run] = read_runs([make_run(tmp_path / "run", rows=rows, **failed)])
    assert run.tokens == 512 + 128
    assert run.tokens_at(np.array([4.0, 5.0])).tolist() == [512, 576]
    assert figure("FLOPs")(run) == pytest.approx(512 * 100 + 128 * 120)
    assert figure("device-hours")(run) == pytest.approx((4 * 8 + 2 * 10) / 3600)
    assert run.metrics.recorded("world_size") == "4, 2 from step 5"


def test_work_completes_rows_of_older_versions(tmp_path: Path) -> None:
    recorded = [recorded_row(step, 128 * step) for step in range(1, 7)]
    new = ("seconds", "world_size", "batch_size", "seq_length", "flops_per_token")
    old = [{k: v for k, v in row.items() if k not in new} for row in recorded[:3]]
    [run] = read_runs([make_run(tmp_path / "run", rows=[*old, *recorded[3:]], world_size=64)])
    assert run.tokens == 6 * 128
    assert figure("FLOPs")(run) == pytest.approx(6 * 128 * 100)
    assert figure("device-hours")(run) == pytest.approx(6 * 8 / 3600)


def test_device_time_is_not_negative_if_older_rows_lose_tokens(tmp_path: Path) -> None:
    """Older rows contain samples times the sequence length at the start."""
    rows = [training_row(step) | {"tokens": 256 * step} for step in range(1, 7)]
    rows += [training_row(step) | {"tokens": 128 * step} for step in (7, 8)]
    for row in rows:
        row["flops_per_s_per_device"] = 1e6
    [run] = read_runs([make_run(tmp_path / "run", rows=rows)])
    assert run.tokens == 6 * 256 + 2 * 128
    assert run.work.device_seconds is not None and (run.work.device_seconds > 0).all()


def test_tokens_in_rows_take_precedence_over_settings(tmp_path: Path) -> None:
    rows = [training_row(step) | {"tokens": 100 * step**2} for step in range(1, 11)]
    rows.append({"step": 5, "val_loss": 4.0})
    path = make_run(tmp_path / "run", rows=rows, rampup_batch_size=[2, 2, 100])
    [run] = read_runs([path])
    assert run.tokens == 10_000
    assert run.validation()[0].tolist() == [2500]


def test_runs_that_differ_in_seed_are_grouped_with_mean_and_deviation(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / f"et-seed{seed}", seed=seed) for seed in (1, 2, 4)]
    paths.append(make_run(tmp_path / "other", seed=3, lr=2e-3))
    paths.append(make_run(tmp_path / "repeat", seed=2))  # the same seed twice is no deviation
    groups = group_runs(read_runs(paths))
    assert [(g.name, len(g.runs)) for g in groups] == [
        ("et (3 seeds)", 3), ("other", 1), ("repeat", 1),
    ]  # fmt: skip
    assert differences(groups) == {"lr": [1e-3, 2e-3, 1e-3]}
    at, mean, spread = groups[0].curve("val_loss")
    values = np.array(
        [[5 - step / 100 + 0.1 * seed for step in (10, 20, 30, 40)] for seed in (1, 2, 4)]
    )
    assert at.tolist() == [10 * STEP, 20 * STEP, 30 * STEP, 40 * STEP]
    assert mean == pytest.approx(values.mean(axis=0))
    assert spread == pytest.approx(values.std(axis=0, ddof=1))
    table = table_of(paths)
    assert table["FLOPs, by Megatron's formula"][0] == "2.4e+11 ± 0"
    cell = table["final validation loss, nats per token"][0]
    assert cell == f"{values[:, -1].mean():.4f} ± {values[:, -1].std(ddof=1):.4f}"


def test_comparison_of_different_lengths_has_the_loss_at_common_tokens(
    tmp_path: Path,
) -> None:
    table = table_of([make_run(tmp_path / "a"), make_run(tmp_path / "b", 25, lr=1.0)])
    assert table["final validation loss, nats per token"] == ["4.7000", "4.9000"]
    assert table[f"validation loss at {20 * STEP:,} tokens, all have it"] == ["4.9000", "4.9000"]
    same = table_of([make_run(tmp_path / "c"), make_run(tmp_path / "d", lr=1.0)])
    assert not any("all have it" in label for label in same)


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    rows = [training_row(step) for step in range(1, 31)]
    lost = [row | {"loss": 99.0, "tokens_per_s": 1e9} for row in rows[20:]]
    again = make_run(tmp_path / "again", rows=[*rows[:20], *lost, *rows[20:]])
    once = make_run(tmp_path / "once", rows=rows, lr=1.0)
    table = table_of([once, again])
    assert len(table) > 5
    assert all(one == other for one, other in table.values())


def test_comparison_page_with_a_run_without_experts(tmp_path: Path, capsys: Any) -> None:
    runs = [make_run(tmp_path / "runs" / "et", router_type="expert-threshold", note="<b>|")]
    runs.append(make_run(tmp_path / "runs" / "dense", 30, layers=()))
    report.main([*runs, "--output", str(tmp_path / "out"), "--markdown", str(tmp_path / "c.md")])
    assert capsys.readouterr().out.count("wrote") == 2
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<h1>Comparison of et, dense</h1>" in page and "&lt;b&gt;|" in page
    assert "running mean over" in page and "<script" not in page
    markdown = (tmp_path / "c.md").read_text()
    assert "| routed experts per token (fan-out) | 1.000 |  |" in markdown
    assert "| router type | expert-threshold |  |" in markdown and "<b>\\|" in markdown
    assert "](out/comparison.png)" in markdown
    picture = matplotlib.image.imread(tmp_path / "out" / "comparison.png")
    assert picture[..., :3].std() > 0.05
    assert not list(tmp_path.rglob("*.tmp"))


def test_comparison_of_runs_without_experts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 12, layers=(), lr=lr) for name, lr in (("a", 1), ("b", 2))]
    report.main(runs)
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: [a, a], "occurs twice"),
        (lambda a, b: [a, b + "x"], "metrics.jsonl: No such file"),
        (lambda a, b: [a, b, "--unigram", "3"], "--unigram is for one run"),
        (lambda a, b: [a, "--markdown", "c.md"], "--markdown is for a comparison"),
        (lambda a, b: [], "no run to show"),
        (lambda a, b: [a, emptied(b)], "run.json does not contain"),
        (lambda a, b: [a, removed(b)], "run.json: No such file"),
    ],
)
def test_comparison_refuses_unusable_runs_and_flags(
    tmp_path: Path, change: Any, message: str
) -> None:
    runs = [make_run(tmp_path / name, 12) for name in "ab"]
    with pytest.raises(UserError, match=message):
        report.main(change(*runs))


def test_comparison_refuses_a_changing_batch_size_without_tokens(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", rampup_batch_size=[2, 2, 100])
    with pytest.raises(UserError, match="batch size changed"):
        read_runs([path])


def diverged_rows(first: int, steps: int = 40) -> list[dict[str, Any]]:
    """Return rows whose losses are not finite from a step on, as the trainer writes them."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        broken = step >= first
        rows.append(
            training_row(step) | ({"loss": "NaN", "grad_norm": "Infinity"} if broken else {})
        )
        if step % 10 == 0:
            rows[-1]["moe/layer_01/experts/cutoff"] = ["-Infinity" if broken else -1.0] * 4
            rows.append({"step": step, "val_loss": "NaN" if broken else 5 - step / 100})
    return rows


@pytest.mark.parametrize("literals", [False, True])
def test_comparison_shows_where_a_run_diverged(tmp_path: Path, capsys: Any, literals: bool) -> None:
    """Earlier versions wrote Python's literals, which the reader still accepts."""
    runs = [
        make_run(tmp_path / "nan", rows=diverged_rows(25)),
        make_run(tmp_path / "good", lr=1.0),
        make_run(tmp_path / "undefined", rows=[*diverged_rows(41), {"step": 41, "val_loss": None}]),
    ]
    file = tmp_path / "nan" / "metrics.jsonl"
    if literals:
        file.write_text(file.read_text().replace('"NaN"', "NaN").replace('"Infinity"', "Infinity"))
    report.main([*runs, "--output", str(tmp_path / "out"), "--markdown", str(tmp_path / "c.md")])
    sentence = (
        "In nan, the training loss is not finite from step 25 on, and the validation loss is not "
        "finite from step 30 on."
    )
    markdown = (tmp_path / "c.md").read_text()
    for text in (capsys.readouterr().out, markdown, (tmp_path / "out/comparison.html").read_text()):
        assert sentence in text and "In good" not in text and "In undefined" not in text
    table = table_of(runs)
    assert table["tokens trained on"] == [f"{40 * STEP:,}"] * 3
    assert table["final validation loss, nats per token"] == ["nan", "4.7000", "4.6000"]
    assert table["best validation loss, nats per token"] == ["4.8000", "4.7000", "4.6000"]


def test_comparison_of_runs_that_diverged_in_the_first_step(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), rows=diverged_rows(1), seed=seed) for seed in (1, 2)]
    report.main(runs)
    assert table_of(runs)["final validation loss, nats per token"] == ["nan"]


def test_a_comparison_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: Any) -> None:
    runs = [make_run(tmp_path / name, 12, lr=lr) for name, lr in (("a", 1), ("b", 2))]
    monkeypatch.setattr("megatron_ext.reports.comparison.compare.render", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.main([*runs, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def emptied(run: str) -> str:
    Path(run, "run.json").write_text("{}")
    return run


def removed(run: str) -> str:
    Path(run, "run.json").unlink()
    return run


def test_runs_with_equal_names_are_named_by_their_folders(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "run", 12) for folder in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run"]
    assert math.isclose(read_runs(paths[:1])[0].tokens, 12 * STEP)
