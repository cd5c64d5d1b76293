import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_ext.errors import UserError
from megatron_ext.inspection.routed_text import RoutedText
from megatron_ext.reports.run_metrics import RunMetrics
from megatron_ext.reports.run_panels import run_panels
from megatron_ext.reports.run_picture import draw
from tests.distributed import run_ranks
from tests.inference.checkpoint import run_dir  # noqa: F401
from tests.reports.metric_rows import EXPERTS, training_row, write_run
from tools import report


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_report_shows_baselines_sample_and_configuration(tmp_path: Path, capsys: Any) -> None:
    rows = [training_row(step) for step in range(1, 41)] + [{"step": 40, "val_loss": 3.5}]
    run = write_run(tmp_path / "some run", rows)
    sample = {"prompt": "Once <b>", "seed": 0, "text": "upon & a time"}
    (run / "sample.json").write_text(json.dumps(sample))
    (run / "run.json").write_text(json.dumps({"commit": "abc123", "settings": {"num_layers": 3}}))
    panels = tmp_path / "panels"
    baselines = ["--unigram", "6.5", "--bigram", "4.25"]
    report.main(["--run-dir", str(run), *baselines, "--panels", str(panels)])
    assert {path.name for path in panels.iterdir()} == {
        "thresholds.png", "usage.png", "loads.png", "fan_out.png",
    }  # fmt: skip
    assert all(map(is_png, panels.iterdir()))
    summary = "validation 3.500 against unigram 6.500, bigram 4.250 (nats per token)"
    assert capsys.readouterr().out.splitlines()[-1] == summary
    assert is_png(run / "report.png")
    page = (run / "report.html").read_text()
    for text in (summary, "Once &lt;b&gt;", "upon &amp; a time", "num layers", "abc123"):
        assert text in page
    assert not any(outside in page for outside in ('src="http', "<script", "<link"))
    assert not list(run.glob("*.tmp"))


def test_report_of_a_run_that_was_trained_further_has_its_latest_validation_loss(
    tmp_path: Path, capsys: Any
) -> None:
    rows = [training_row(step) for step in range(1, 21)]
    run = write_run(
        tmp_path / "run", [*rows, {"step": 10, "val_loss": 4.1}, {"step": 20, "val_loss": 3.4}]
    )
    for step, loss in ((10, "3.400"), (20, "4.022")):  # the file's own if it is not older
        validation = {"validation": 4.022, "step": step, "tokens": 900, "unigram": 6.5}
        (run / "validation.json").write_text(json.dumps(validation))
        report.main(["--run-dir", str(run)])
        headline = f"validation {loss} against unigram 6.500 (nats per token)"
        assert capsys.readouterr().out.splitlines()[-1] == headline
        page = (run / "report.html").read_text()
        assert headline in page and ("validation tokens" in page) == (step == 20)


def test_report_of_a_run_with_a_single_step(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", [training_row(1)], tail='{"step": 2, "lo')
    report.main(["--run-dir", str(run)])
    assert is_png(run / "report.png")
    assert "nats per token)" not in capsys.readouterr().out


def test_report_of_a_run_without_experts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [training_row(step, layers=()) for step in range(1, 20)])
    report.main(["--run-dir", str(run)])
    assert is_png(run / "report.png")
    assert "Routing by layer" not in (run / "report.html").read_text()


def test_report_of_an_unfinished_run_without_validation_or_thresholds(
    tmp_path: Path, capsys: Any
) -> None:
    rows = [training_row(step) for step in (1, 2)]
    rows = [{n: v for n, v in row.items() if "threshold" not in n} for row in rows]
    run = write_run(tmp_path / "run", rows)
    (run / "run.json").write_text(json.dumps({"settings": {"train_iters": 800}}))
    report.main([str(run)])
    sentence = "The run has made 2 of 800 steps."
    assert capsys.readouterr().out.splitlines()[-1] == sentence
    page = (run / "report.html").read_text()
    assert sentence in page
    # Panels without data, of thresholds, loads and fan-out, are left out.
    assert re.findall(r'<img alt="([^"]*)"', page) == [
        "losses over steps", "usage and capacity over steps",
    ]  # fmt: skip
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page


def test_panels_of_a_short_run_show_every_step_inside_of_their_axes() -> None:
    metrics = RunMetrics([training_row(step) for step in (1, 2, 3)])
    figure = Figure()
    for panel, axes in zip(run_panels(metrics, {}), figure.subplots(1, 4)):
        panel.draw(axes)
        low, high = axes.get_xlim()
        assert low < 1 and high > 3
    loss = figure.axes[0].get_lines()[0]
    assert loss.get_label() == "training" and loss.get_marker() == "o"


def test_report_of_a_diverged_run_names_the_steps(tmp_path: Path, capsys: Any) -> None:
    rows = [
        training_row(step) | ({"loss": "NaN"} if step in (5, 9) else {}) for step in range(1, 41)
    ]
    rows.append({"step": 40, "val_loss": "Infinity"})
    run = write_run(tmp_path / "run", rows)
    report.main([str(run)])
    sentence = (
        "The training loss is not finite at 2 steps, first at step 5, and the validation loss is "
        "not finite from step 40 on."
    )
    printed = capsys.readouterr().out
    assert sentence in printed and "validation inf (nats per token)" in printed
    assert sentence in (run / "report.html").read_text() and is_png(run / "report.png")


def test_report_refuses_a_run_of_a_policy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.5, "reward": 3.0}])
    (run / "run.json").write_text(json.dumps({"judge": {"name": "a"}, "settings": {}}))
    with pytest.raises(UserError, match=r"is a run of et-align train-policy\. Use et-align report"):
        report.main([str(run)])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "metrics.jsonl: No such file"),
        ("", "no training step"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2 is not JSON"),
    ],
)
def test_report_refuses_a_missing_empty_or_damaged_log(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        report.main(["--run-dir", str(tmp_path)])


def test_last_row_of_a_repeated_step_counts() -> None:
    rows = [{**training_row(step), "loss": 9.0} for step in (1, 2, 3)]
    rows += [{"step": 3, "val_loss": 8.0}, training_row(2), training_row(3)]
    rows += [{"step": 3, "val_loss": 7.0}]
    metrics = RunMetrics(rows)
    steps, losses = metrics.series("loss")
    assert steps.tolist() == [1, 2, 3]
    assert losses.tolist() == [9.0, training_row(2)["loss"], training_row(3)["loss"]]
    assert metrics.evaluations == {3: 7.0}


def test_warmup_end_and_target_rate_follow_from_the_loads() -> None:
    metrics = RunMetrics([training_row(step, warmup=12) for step in range(1, 31)])
    assert metrics.warmup_end == 12
    assert metrics.target_rate == pytest.approx(1 / EXPERTS)
    only_warmup = RunMetrics([training_row(step, warmup=99) for step in range(1, 31)])
    assert only_warmup.warmup_end is None
    assert RunMetrics([training_row(step, warmup=0) for step in range(1, 31)]).warmup_end is None


def test_recent_is_the_mean_of_the_last_tenth() -> None:
    metrics = RunMetrics([training_row(step) for step in range(1, 101)])
    expected = np.mean([training_row(step)["loss"] for step in range(90, 101)])
    assert metrics.recent("loss") == pytest.approx(expected)
    assert metrics.recent("experts/load", 1).shape == (EXPERTS,)
    assert metrics.recent("nothing") is None


def test_picture_of_a_text_with_line_ends_and_markup(tmp_path: Path) -> None:
    tokens = ["A", " $x^2", "\n", "", "end", " of", " it", "é" * 200]
    experts = [[list(range(i % 3)) for i in range(len(tokens))] for _ in range(2)]
    margins = [[[0.5] * len(chosen) for chosen in layer] for layer in experts]
    text = RoutedText(tokens, [1, 2], experts, margins, [1.0] * len(tokens))
    metrics = RunMetrics([training_row(step) for step in range(1, 31)])
    draw(metrics, tmp_path / "p.png", "a title", {}, text=text)
    assert is_png(tmp_path / "p.png")


@pytest.mark.slow
def test_report_of_a_real_run_routes_a_text(run_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("ba kélo müni rasuté vozi ba")
    # In a separate process: this one may have Megatron without the device.
    run_ranks(report.main, 1, ["--run-dir", str(run_dir), "--text-file", str(text)])
    assert is_png(run_dir / "report.png")
    page = (run_dir / "report.html").read_text()
    assert "Number of experts of each token" in page and "layer 1: " in page and "layer 3: " in page
