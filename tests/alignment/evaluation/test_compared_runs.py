"""Tests of reports on several runs: arms, paired differences, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alignment.commands.report import main
from alignment.evaluation.study.prompt_intervals import (
    change_over_prompts,
    difference,
    mean_with_interval,
)
from alignment.evaluation.study.study_reader import read_compared_runs, read_study
from alignment.evaluation.study.study_runs import GOLD, PROXY
from megatron_ext.errors import UserError
from tests.alignment.evaluation.small_study import write, write_run
from tests.alignment.evaluation.test_study_report import cells, opening, reported, sentences

PROMPTS = [f"p{i}" for i in range(40)]
STEPS = range(0, 41, 20)


def write_scored_run(
    folder: Path, seed: int, changes: tuple[float, float], prompts: Any = PROMPTS, **settings: Any
) -> dict[int, dict[str, list[float]]]:
    """Write a run whose scores of every prompt are known, and return them by step and role."""
    write_run(folder, "label", seed, STEPS)
    facts: dict[str, Any] = {"seed": seed, "held_out": ["a"], "kl": 0.0, "stop_on_alarm": False}
    about = json.loads((folder / "run.json").read_text()) | {"settings": facts | settings}
    (folder / "run.json").write_text(json.dumps(about))
    draw = np.random.default_rng([seed, len(folder.name)])
    hard = draw.normal(0, 2, len(prompts))  # prompts differ much more than responses to them
    scores: dict[int, dict[str, list[float]]] = {}
    rows = []
    for step in STEPS:
        done = step / max(STEPS)
        values = [4 + hard + c * done + draw.normal(0, 0.3, len(prompts)) for c in changes]
        scores[step] = {name: v.tolist() for name, v in zip(("proxy", "gold"), values)}
        proxy, gold = (float(v.mean()) for v in values)
        rows.append({
            "step": step, "grade/proxy": proxy, "grade/gold": gold, "grade/gap": proxy - gold,
            "grade/alarm": 0,
        })  # fmt: skip
    write(folder / "metrics.jsonl", rows)
    grades = [{"step": s, "prompts": list(prompts), "scores": of} for s, of in scores.items()]
    write(folder / "grades.jsonl", grades)
    return scores


def test_interval_of_a_mean_covers_every_bootstrap_resample_of_few_values() -> None:
    """The reference is all 4**4 resamples of four values."""
    values = np.array([1.0, 2.0, 4.0, 9.0])
    grid = np.stack(np.meshgrid(*[values] * 4), axis=-1).reshape(-1, 4).mean(axis=1)
    estimate = mean_with_interval(values)
    assert estimate is not None and estimate.prompts == 4 and estimate.value == 4.0
    low, high = np.quantile(grid, [0.025, 0.975], method="lower")
    spacing = 0.5  # of neighboring means in the tails, which a sample of resamples may hit
    assert estimate.low == pytest.approx(low, abs=spacing)
    assert estimate.high == pytest.approx(high, abs=spacing)
    assert mean_with_interval(np.array([1.0])) is None
    equal = mean_with_interval(np.array([2.0, 2.0]))
    assert equal is not None and (equal.low, equal.high) == (2.0, 2.0)


def test_changes_are_paired_by_prompt(tmp_path: Path) -> None:
    scores = write_scored_run(tmp_path / "run", 1, (2.0, -0.5))
    [run] = read_study(tmp_path / "run").runs
    for name, role in ((PROXY, "proxy"), (GOLD, "gold")):
        changes = np.array(scores[40][role]) - np.array(scores[0][role])
        change = change_over_prompts(run, name)
        assert change is not None and change.prompts == 40
        assert change.value == pytest.approx(changes.mean())
        reach = stats.sem(changes) * stats.t.ppf(0.975, 39)
        assert change.high - change.low == pytest.approx(2 * reach, rel=0.15)
    gap = change_over_prompts(run, "gap")
    assert gap is not None and gap.value == pytest.approx(2.5, abs=0.2)
    page = reported(tmp_path / "run")
    proxy, gold = (change_over_prompts(run, name) for name in (PROXY, GOLD))
    assert proxy and gold
    assert opening(page) == (
        f"The policy is gaming its judge (label): proxy {proxy.value:+.2f} (95 % interval "
        f"{proxy.low:+.2f} to {proxy.high:+.2f}), gold {gold.value:+.2f} ({gold.low:+.2f} to "
        f"{gold.high:+.2f})."
    )


def test_prompts_that_a_judge_failed_on_leave_the_change(tmp_path: Path) -> None:
    scores = write_scored_run(tmp_path / "run", 1, (1.0, 0.0))
    rows = [json.loads(line) for line in (tmp_path / "run" / "grades.jsonl").open()]
    rows[-1]["scores"]["gold"][:10] = [None] * 10
    write(tmp_path / "run" / "grades.jsonl", rows)
    [run] = read_study(tmp_path / "run").runs
    change = change_over_prompts(run, PROXY)
    changes = (np.array(scores[40]["proxy"]) - np.array(scores[0]["proxy"]))[10:]
    assert change is not None and change.prompts == 30
    assert change.value == pytest.approx(changes.mean())


def test_two_runs_are_compared_by_paired_prompts(tmp_path: Path, capsys: Any) -> None:
    one = write_scored_run(tmp_path / "base", 1, (2.0, -1.0))
    # The same prompts, and so the same difficulties.
    other = write_scored_run(tmp_path / "with", 1, (1.0, 0.5), kl=0.1)
    main([str(tmp_path / "base"), str(tmp_path / "with")])
    page = (tmp_path / "comparison" / "report.html").read_text()
    study = read_compared_runs([tmp_path / "base", tmp_path / "with"])
    assert [group.judge for group in study.groups] == ["base", "with"]
    base, changed = study.groups
    result = difference(base, changed, GOLD)
    assert result is not None
    changes = np.array(other[40]["gold"]) - np.array(one[40]["gold"])
    assert (result[0], result[1].prompts) == (40, 40)
    assert result[1].value == pytest.approx(changes.mean())
    assert opening(page) == (
        "Of 2 arms: proxy and gold diverge in base; gold improves, but proxy improves more in with."
    )
    assert sentences(page)[2] == (
        f"with against base at step 40: gold is higher, by {changes.mean():+.2f} (95 % interval "
        f"{result[1].low:+.2f} to {result[1].high:+.2f}), paired over 40 held-out prompts."
    )
    assert cells(page)["kl"] == ["0.0", "0.1"]
    assert "<h1>Comparison of base, with</h1>" in page
    assert opening(page) in capsys.readouterr().out


def test_seeds_of_an_arm_are_recognized_by_their_settings(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_scored_run(tmp_path / f"plain-seed{seed}", seed, (1.0, 0.5))
    for name, settings in (("kl-1", {"kl": 0.1}), ("again", {})):
        write_scored_run(tmp_path / name, 2, (1.0, 0.5), **settings)
    names = ["plain-seed1", "plain-seed2", "kl-1", "plain-seed3", "again"]
    study = read_compared_runs([tmp_path / name for name in names])
    # "again" has the seed of another run, and is no further seed.
    sizes = [(group.judge, len(group.runs)) for group in study.groups]
    assert sizes == [("plain", 3), ("kl-1", 1), ("again", 1)]


def test_runs_of_equal_names_are_named_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scored_run(tmp_path / name / "run", 1, (1.0, 0.5), kl=len(name))
    study = read_compared_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [group.judge for group in study.groups] == ["a/run", "b/run"]


def test_a_run_without_gold_reports_its_proxy(tmp_path: Path) -> None:
    write_scored_run(tmp_path / "run", 1, (1.0, 0.0), gold=[])
    for name in ("metrics", "grades"):
        file = tmp_path / "run" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.open()]
        for row in rows:
            for key in ("grade/gold", "grade/gap"):
                row.pop(key, None)
            row.get("scores", {}).pop("gold", None)
        write(file, rows)
    about = json.loads((tmp_path / "run" / "run.json").read_text()) | {"gold": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    page = reported(tmp_path / "run")
    assert opening(page).startswith(
        "Nothing shows whether the policy games its judge, as no gold judge graded it (label): "
        "proxy +"
    )
    assert "95 % interval" in opening(page)
    assert "no proxy or no gold" not in page


def test_a_run_without_held_out_prompts_reports_its_reward(tmp_path: Path) -> None:
    write_scored_run(tmp_path / "run", 1, (1.0, 0.0), held_out=[])
    (tmp_path / "run" / "grades.jsonl").unlink()
    rows = [{"step": step, "reward": 4 + step / 10, "loss": 0.1} for step in range(1, 21)]
    write(tmp_path / "run" / "metrics.jsonl", rows)
    page = reported(tmp_path / "run")
    assert opening(page) == (
        "Nothing shows whether the policy games its judge, as no prompts were held out (label): "
        "the reward went from 4.15 to 5.95."
    )


def other_prompts(folder: Path) -> list[Path]:
    write_scored_run(folder / "c", 1, (1.0, 0.5), [f"q{i}" for i in range(9)])
    return [folder / "a", folder / "c"]


def other_gold(folder: Path) -> list[Path]:
    write_scored_run(folder / "c", 1, (1.0, 0.5))
    about = json.loads((folder / "c" / "run.json").read_text())
    (folder / "c" / "run.json").write_text(
        json.dumps(about | {"gold": {"name": "rule", "identity": "1a"}})
    )
    return [folder / "a", folder / "c"]


def without_metrics(folder: Path) -> list[Path]:
    write_scored_run(folder / "c", 1, (1.0, 0.5))
    (folder / "c" / "metrics.jsonl").unlink()
    return [folder / "a", folder / "c"]


def of_pretraining(folder: Path) -> list[Path]:
    (folder / "c").mkdir()
    (folder / "c" / "run.json").write_text('{"settings": {"num_layers": 2}}')
    return [folder / "a", folder / "c"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: [folder / "a", folder / "." / "a"], "occurs twice. Name each run once."),
        (other_prompts, "a and .*c were graded on different held-out prompts, so that their"),
        (other_gold, "have different gold judges, so that their scores cannot be compared."),
        (without_metrics, "The run .*c has no grading yet. Leave it out, or wait"),
        (of_pretraining, "c is not a run of et-align train-policy. python -m tools.report shows"),
        (lambda folder: [folder / "a", folder / "none"], "none has no study.json and no run.json"),
        (lambda folder: [folder], "Name the runs in it: .*/a"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    write_scored_run(tmp_path / "a", 1, (1.0, 0.5))
    with pytest.raises(UserError, match=message) as caught:
        main([str(folder) for folder in make(tmp_path)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "comparison").exists()
