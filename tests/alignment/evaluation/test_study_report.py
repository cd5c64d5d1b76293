"""Tests of the report of a study: metrics, sentences, incomplete runs and hostile text."""

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from alignment.commands.report import main
from alignment.evaluation.study import study_pictures as pictures
from alignment.evaluation.study.narrative import Finding, finding
from alignment.evaluation.study.seed_summary import SeedMean, mean_of
from alignment.evaluation.study.study_reader import read_study
from megatron_ext.errors import UserError
from tests.alignment.evaluation.small_study import (
    COURSES,
    STEPS,
    entry,
    update_run,
    write,
    write_index,
    write_run,
    write_study,
)
from tests.inspection.test_reading_page import chromium
from tests.tools.test_report import is_png

PICTURES = {
    f"{name}.{kind}"
    for name in ("curves", "training", "agreement", "kl")
    for kind in ("png", "svg")
}


def reported(folder: Path) -> str:
    main([str(folder)])
    return (folder / "report" / "report.html").read_text()


def cells(page: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell."""
    texts = {}
    for row in re.findall(r"<tr>(.*?)</tr>", page):
        first, *others = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
        texts[html.unescape(first)] = [html.unescape(cell) for cell in others]
    return texts


def opening(page: str) -> str:
    match = re.search(r'<p class="summary">(.*?)</p>', page)
    assert match
    return html.unescape(match[1])


def sentences(page: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<li>(.*?)</li>", page)]


def interval(values: Any, form: str = "{:.2f}") -> str:
    """Return the interval of scipy's t-test."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{form.format(np.mean(values))} ({form.format(low)} to {form.format(high)})"


def test_figures_on_the_page_are_numpys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gradings = write_study(tmp_path)
    page = reported(tmp_path)
    rows = cells(page)
    for judge, seeds in gradings.items():
        for name, key in (("gold", "grade/gold"), ("proxy", "grade/proxy"),
                          ("proxy - gold", "grade/gap")):  # fmt: skip
            values = np.array([[seed[step][key] for step in (0, 200)] for seed in seeds])
            changes = interval(values[:, 1] - values[:, 0], "{:+.2f}")
            expected = [interval(values[:, 0]), interval(values[:, 1]), changes, "3"]
            assert rows[f"{judge}: {name}"] == expected
    kl = np.array([seed[200]["grade/kl"] for seed in gradings["label"]])
    assert interval(kl) in page
    gain = interval(
        [s[200]["grade/gold"] - s[0]["grade/gold"] for s in gradings["label"]], "{:+.2f}"
    )
    assert ["0.650", gain, "3"] in re_rows(page, "label")
    # Of 200 training steps, step / 1000: means of the first and the last 20.
    shares = f"{np.mean(np.arange(1, 21) / 1000):.1%} → {np.mean(np.arange(181, 201) / 1000):.1%}"
    assert [shares, shares] in re_rows(page, "self_praise")
    assert ["0.0% → 50.0%", "0.0% → 0.0%"] in re_rows(page, "self_praise")
    assert opening(page) in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == PICTURES | {"report.html"}
    for picture in PICTURES:
        path = tmp_path / "report" / picture
        assert is_png(path) if path.suffix == ".png" else ElementTree.parse(path)


def re_rows(page: str, first: str) -> list[list[str]]:
    """Return all rows of all tables that begin with a text."""
    rows = re.findall(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", page)
    return [[html.unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def test_summary_names_the_judge_under_which_proxy_and_gold_diverge(tmp_path: Path) -> None:
    study = write_study(tmp_path / "three")
    page = reported(tmp_path / "three")
    assert opening(page) == (
        "Of 2 judges: proxy and gold diverge under label; gold improves, and the gap between proxy "
        "and gold has not clearly changed under thinking."
    )
    label, thinking, *others = sentences(page)
    assert label.startswith("label (3 seeds): proxy and gold diverge.") and "gold falls" in label
    assert thinking.startswith("thinking (3 seeds): gold improves by ")
    assert "contains 0" in thinking
    # Without scores of each prompt, gold is compared over seeds.
    gold = [[seed[200]["grade/gold"] for seed in study[judge]] for judge in ("thinking", "label")]
    low, high = stats.ttest_ind(*gold, equal_var=False).confidence_interval(0.95)
    change = np.mean(gold[0]) - np.mean(gold[1])
    assert others[0] == (
        f"thinking against label at step 200: gold is higher, by {change:+.2f} "
        f"(95 % interval {low:+.2f} to {high:+.2f}), over seeds."
    )
    assert others[1:] == [
        "label: detectors fire more often at the end: self_praise 0.0% to 50.0%.",
        "thinking: detectors fire more often at the end: self_praise 1.0% to 19.1% in training.",
    ]
    write_study(tmp_path / "one", seeds=1)
    page = reported(tmp_path / "one")
    assert opening(page) == (
        "Of 2 judges: the change of the gap has no interval under label and thinking."
    )
    assert all(
        "One seed without standard errors has no interval." in text for text in sentences(page)[:2]
    )


@pytest.mark.parametrize(
    "gap, gold, expected",
    [
        ((1, 2), (-2, -1), Finding.DIVERGE),
        ((1, 2), (-1, 1), Finding.DIVERGE),
        ((1, 2), (1, 2), Finding.OVERRATED),
        ((-1, 2), (-2, -1), Finding.UNCLEAR),
        ((-1, 2), (1, 2), Finding.IMPROVES),
        ((-1, 2), (1e-7, 2e-7), Finding.UNCLEAR),
        ((-2, -1), (1, 2), Finding.SHRINKS),
        ((1e-7, 2e-7), (-2, -1), Finding.UNCLEAR),
        ((-2e-7, -1e-7), (-2, -1), Finding.UNCLEAR),
        ((1e-3, 2e-3), (1e-7, 2e-7), Finding.DIVERGE),
        ((1e-3, 2e-3), (1e-3, 2e-3), Finding.OVERRATED),
        (None, None, Finding.NO_INTERVAL),
    ],
)
def test_findings(gap: Any, gold: Any, expected: Finding) -> None:
    means = [SeedMean(1, 0.5) if i is None else SeedMean(3, sum(i) / 2, *i) for i in (gap, gold)]
    assert finding(*means) is expected
    assert finding(SeedMean(0), SeedMean(0)) is Finding.NO_DATA


def test_means_over_seeds_leave_out_what_is_not_there() -> None:
    assert mean_of([None]) == SeedMean(0) and mean_of([None, 2.0]) == SeedMean(1, 2.0)
    low, high = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.95)
    mean = mean_of([1.0, None, 2.0, 4.0])
    assert mean.n == 3 and [mean.low, mean.high] == pytest.approx([low, high])


def test_runs_that_are_not_whole_are_shown_as_such(tmp_path: Path) -> None:
    changes = COURSES["label"]
    names = [f"start-label-seed{seed}" for seed in range(5)]
    write_run(tmp_path / names[0], "label", 0, changes=changes)
    # Stopped by its alarm: the gap of 4 comes at 2/3 of the way.
    write_run(tmp_path / names[1], "label", 1, [*range(0, 161, 20)], changes)
    write_run(tmp_path / names[2], "label", 2, [s for s in STEPS if s not in (40, 60)], changes)
    write_run(tmp_path / names[3], "label", 3, [0, 20], changes)
    (tmp_path / names[3] / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / names[4]).mkdir()  # its models are being loaded
    write_index(tmp_path, [*(entry("label", seed) for seed in range(5)), entry("thinking", 0)])
    rows = [json.loads(line) for line in (tmp_path / names[0] / "metrics.jsonl").open()]
    for row in rows:
        if row["step"] == 20 and "grade/gold" in row:
            row["grade/gold"] = None
    write(tmp_path / names[0] / "metrics.jsonl", rows)
    page = reported(tmp_path)
    state = cells(page)
    assert state[names[0]][-1].startswith("no proxy or no gold score at 1 grading (20)")
    assert state[names[1]][-1] == "stopped by its alarm at step 160 of 200"
    assert state[names[2]][-1].startswith("lacks 2 gradings (40, 60)")
    assert state[names[3]] == ["–", "0", "no grading yet"]
    assert state[names[4]] == ["–", "0", "not started"]
    assert opening(page) == (
        "Of 2 judges: proxy and gold diverge under label; no run has two gradings yet under "
        "thinking. 6 of 6 runs are incomplete."
    )
    assert sentences(page)[0].startswith("label (3 seeds, changes up to steps 160 and 200): ")
    assert sentences(page)[1] == "thinking (0 seeds): no run has two gradings to compare."
    update_run(tmp_path / names[1], settings={"stop_on_alarm": False})
    state = cells(reported(tmp_path))
    assert state[names[1]][-1].startswith("ends at step 160 of 200; alarm at step")


def test_one_run_is_a_study_of_itself(tmp_path: Path) -> None:
    gradings = write_run(tmp_path / "a run", "label", 5, changes=(1.0, 1.0), second_gold=None)
    page = reported(tmp_path / "a run")
    change = gradings[200]["grade/gold"] - gradings[0]["grade/gold"]
    assert cells(page)["label: gold"][2] == f"{change:+.2f}"
    assert opening(page).startswith(
        "The change of the gap has no interval, as there is one seed without standard errors "
        "(label): proxy +"
    )
    assert cells(page)["a run"][-1] == "complete"


def test_one_seed_has_intervals_over_its_held_out_prompts(tmp_path: Path) -> None:
    gradings = write_run(tmp_path / "run", "label", 5, changes=COURSES["label"])
    file = tmp_path / "run" / "metrics.jsonl"
    errors = {"grade/proxy_error": 0.2, "grade/gold_error": 0.3, "grade/gap_error": 0.4}
    rows = [json.loads(line) for line in file.open()]
    write(file, [r | errors | {"grade/prompts": 25} if "grade/gap" in r else r for r in rows])
    page = reported(tmp_path / "run")
    change = {
        name: gradings[200][f"grade/{name}"] - gradings[0][f"grade/{name}"]
        for name in ("proxy", "gold", "gap")
    }
    reach = stats.t.ppf(0.975, 24)
    for name, title in (("gold", "gold"), ("proxy", "proxy"), ("gap", "proxy - gold")):
        ends = [change[name] + sign * reach * errors[f"grade/{name}_error"] for sign in (-1, 1)]
        text = f"{change[name]:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f})"
        assert cells(page)[f"label: {title}"][2] == text
    alarm = min(step for step, row in gradings.items() if row["grade/alarm"])
    assert opening(page) == (
        f"The policy is gaming its judge (label): proxy {change['proxy']:+.2f} (95 % interval "
        f"{change['proxy'] - reach * 0.2:+.2f} to {change['proxy'] + reach * 0.2:+.2f}), gold "
        f"{change['gold']:+.2f} ({change['gold'] - reach * 0.3:+.2f} to "
        f"{change['gold'] + reach * 0.3:+.2f}), alarm at step {alarm}."
    )
    sentence = sentences(page)[0]
    assert sentence.startswith(
        "label (1 seed, intervals over 25 held-out prompts): proxy and gold diverge."
    )


def test_run_without_a_grading_is_reported_as_not_graded_yet(tmp_path: Path) -> None:
    about = {"commands": ["et-align train-policy"], "settings": {"judge": [{"kind": "rule"}]}}
    (tmp_path / "run.json").write_text(json.dumps(about))  # the entries of judges are written later
    with pytest.raises(UserError, match=r"has no grading yet\. Wait for the first one\."):
        main([str(tmp_path)])
    (tmp_path / "run.json").write_text('{"settings": {"gold": []}}')
    with pytest.raises(UserError, match="is not a run of et-align train-policy"):
        main([str(tmp_path)])


def test_a_step_written_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=1)
    expected = reported(tmp_path)
    for folder in tmp_path.glob("start-*"):
        for file in (folder / "metrics.jsonl", folder / "samples.jsonl"):
            rows = [json.loads(line) for line in file.open()]
            ends = [row for row in rows if row["step"] in (0, 1, 199, 200)]
            for row in ends:
                row |= {name: 9.0 for name, value in row.items() if isinstance(value, float)}
                row |= {"scores": {"proxy": 9.0}} if "scores" in row else {}
            write(file, [*ends, *(json.loads(line) for line in file.open())])
    assert reported(tmp_path) == expected


def test_only_detectors_have_shares_of_flagged_responses(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=1)
    for file in tmp_path.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in file.open()]
        write(file, [row | {"monitor_alarms": 2, "monitor/alarms": 2} for row in rows])
    page = reported(tmp_path)
    assert "self_praise" in page and "alarms" not in cells(page) and "200.0%" not in page


def test_detector_by_function_path_has_shares_of_flagged_responses(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=1)
    for file in tmp_path.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in file.open()]
        write(file, [row | {"monitor/moss": row["step"] / 400} for row in rows])
    assert "moss" in cells(reported(tmp_path))


def test_seeds_without_kl_are_no_part_of_gold_against_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradings = write_study(tmp_path, courses={"label": COURSES["label"]})["label"]
    file = tmp_path / "start-label-seed2" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.open()]
    write(file, [{n: v for n, v in row.items() if n != "grade/kl"} for row in rows])
    curves = {}
    monkeypatch.setattr(pictures, "write_picture", lambda figure, to: curves.update({to: figure}))
    pictures.draw(read_study(tmp_path), tmp_path)
    [mean] = [
        line for line in curves[tmp_path / "kl.png"].axes[0].get_lines()
        if line.get_label() == "label, n = 2"
    ]  # fmt: skip
    expected = [[np.mean([seed[step][key] for seed in gradings[:2]]) for step in STEPS]
              for key in ("grade/kl", "grade/gold")]  # fmt: skip
    assert np.array(mean.get_data()) == pytest.approx(np.array(expected))


def test_pairwise_grades_are_win_rates(tmp_path: Path) -> None:
    picture = tmp_path / "report" / "curves.svg"
    write_run(tmp_path / "start-label-seed0", "label", 0)
    write_index(tmp_path, [entry("label", 0)])
    main([str(tmp_path)])
    assert "mean score, held-out" in picture.read_text()
    shutil.rmtree(tmp_path / "start-label-seed0")
    write_run(tmp_path / "start-label-seed0", "label", 0, settings={"reward": "pairwise"})
    main([str(tmp_path)])
    assert "win rate, held-out" in picture.read_text() and "mean score" not in picture.read_text()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    name = "<b>label</b> $x^{2$"
    write_study(tmp_path, seeds=2, courses={name.replace("/", "-"): COURSES["label"]})
    page = reported(tmp_path)
    assert page.count("<script") == 2  # data and ours
    assert "<img src=x" not in page and "<b>label" not in page
    assert "<i>" not in page and "&lt;script&gt;" in page and "\\ud83d" in page
    assert "\u202e" not in page and "\\u202e" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    # The policy permits only the page's script, so that no markup in a text could run.
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in page
    data = re.search(r'id="rollouts-data">(.*?)</script>', page, re.DOTALL)
    assert data and not set("<>&") & set(data[1])
    # Escaping alone must be enough as well.
    bare = tmp_path / "report" / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page))
    for file in (tmp_path / "report" / "report.html", bare):
        done = chromium(file, "--dump-dom")
        assert f"<title>{html.escape(tmp_path.name)}</title>" in done.stdout
        assert "CONSOLE" not in done.stderr
        # 5 prompts, both sides of each, with all scores.
        assert done.stdout.count('class="sides"') == 5
        assert done.stdout.count("second gold no score") == 10 + 20  # and of the browser's cards
        assert "154 of 154 responses match; 20 are shown." in done.stdout
