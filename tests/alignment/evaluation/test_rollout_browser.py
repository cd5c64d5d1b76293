"""Tests of the browser of rollouts: its data, and its page."""

import html
import json
import re
from pathlib import Path

import pytest

from alignment.evaluation.study.rollout_browser import browser_data
from alignment.evaluation.study.study_reader import read_study
from tests.alignment.evaluation.small_study import HOSTILE, write, write_run
from tests.alignment.evaluation.test_study_report import reported
from tests.inspection.test_reading_page import chromium


def make_run(folder: Path, lengths: int = 20) -> Path:
    """Write a run with samples of three gradings and responses of four training steps."""
    write_run(folder, "label", 1, range(0, 41, 20))
    message = [{"role": "user", "content": f"Say it. {HOSTILE}"}]
    samples = [
        {
            "step": step, "prompt": f"p{i}", "messages": message,
            "response": f"answer {i} at {step} " + "word " * lengths,
            "scores": {"proxy": i + step / 10, "gold": None if i == 4 else 4.0},
            "flags": ["repetition"] if step == 40 and i < 2 else [],
        }
        for step in (0, 20, 40)
        for i in range(5)
    ]  # fmt: skip
    rollouts = [
        {
            "step": step, "id": f"q{i}:0", "prompt": f"q{i}", "messages": message,
            "response": "Trained.", "scores": {"reward": float(i)},
            "flags": ["self_praise"] if i == 2 else [],
        }
        for step in (1, 2, 3, 4)
        for i in range(3)
    ]  # fmt: skip
    write(folder / "samples.jsonl", samples)
    write(folder / "rollouts.jsonl", rollouts + rollouts[:3])  # a resumed run repeats a step
    return folder


def test_data_have_all_responses_once_with_gaps(tmp_path: Path) -> None:
    data = browser_data(read_study(make_run(tmp_path / "run")))
    assert len(data.rows) == 15 + 12 and not data.notes and len(data.prompts) == 1
    gaps = {(row["step"], row["gap"]) for row in data.rows if row["from"] == "held-out"}
    assert (40, 0.0) in gaps and (40, 3.0) in gaps and (40, None) in gaps
    assert all(row["gap"] is None for row in data.rows if row["from"] == "training")


def test_data_that_do_not_fit_keep_flagged_responses_of_every_step(tmp_path: Path) -> None:
    study = read_study(make_run(tmp_path / "run", lengths=300))
    data = browser_data(study, most=11_000)
    assert sum(len(row["response"]) for row in data.rows) <= 11_000
    assert {row["step"] for row in data.rows} == {0, 20, 40, 1, 2, 3, 4}
    held_out = [row for row in data.rows if row["from"] == "held-out" and row["step"] == 40]
    assert held_out[0]["flags"] == ["repetition"]
    assert re.match(rf"The page has {len(data.rows)} of 27 recorded responses", data.notes[0])


def test_long_responses_are_cut_with_a_statement(tmp_path: Path) -> None:
    data = browser_data(read_study(make_run(tmp_path / "run", lengths=2000)))
    (row, *_) = [row for row in data.rows if row["from"] == "held-out"]
    assert re.search(r"\[2,0\d\d characters left out\]$", row["response"])
    assert data.notes == [
        "Of 15 responses the page has only the first 8,000 characters, or of the prompt the first "
        "4,000."
    ]


DRIVER = """<script>
const out = {};
const set = (name, value) => {
  form[name].value = value; form.dispatchEvent(new Event("input", { bubbles: true }));
};
const result = () => [matching.length, list.children.length];
out.all = result();
set("flag", "repetition"); out.repetition = result();
set("flag", " any"); out.flagged = result();
set("flag", " none"); out.unflagged = result();
set("flag", "");
set("first", "20"); set("last", "20"); out.step = result(); set("first", ""); set("last", "");
set("from", "training"); out.training = result(); set("from", "");
set("score", "proxy"); set("low", "4"); set("high", "7"); out.score = result();
out.highest = list.children[0].textContent;
set("order", "lowest"); out.lowest = list.children[0].textContent;
set("low", ""); set("high", "");
set("search", "ANSWER 3 AT 4"); out.search = result();
set("search", "nowhere"); out.nothing = result(); out.count = count.textContent;
set("search", ""); more.click(); out.more = result();
out.options = [...form.flag.options].map((option) => option.textContent);
const box = document.createElement("pre");
box.id = "result"; box.textContent = JSON.stringify(out); document.body.append(box);
</script>"""


def test_a_browser_filters_orders_and_searches(tmp_path: Path) -> None:
    page = reported(make_run(tmp_path / "run"))
    file = tmp_path / "page.html"
    # The policy permits the page's script alone: the driver needs a page without it.
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    file.write_text(bare.replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    done = chromium(file, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stdout[-2000:]
    out = json.loads(html.unescape(result[1]))
    assert out["all"] == [27, 20] and out["more"] == [27, 27]
    assert out["repetition"] == [2, 2]
    assert out["flagged"] == [6, 6] and out["unflagged"] == [21, 20]
    assert out["step"] == [5, 5] and out["training"] == [12, 12]
    # Of 0 to 4 at 0, 2 to 6 at 20, 4 to 8 at 40.
    assert out["score"] == [1 + 3 + 4, 8]
    assert "proxy 7.00" in out["highest"] and "proxy 4.00" in out["lowest"]
    assert out["search"] == [1, 1] and out["nothing"] == [0, 0]
    assert out["count"] == "0 of 27 responses match; 0 are shown."
    assert out["options"] == ["all", "any flag", "no flag", "self praise (4)", "repetition (2)"]


def test_a_page_without_responses_has_no_browser(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for name in ("samples", "rollouts"):
        (tmp_path / "run" / f"{name}.jsonl").unlink()
    page = reported(tmp_path / "run")
    assert "<script" not in page and "script-src" not in page and "Rollouts" not in page


@pytest.mark.parametrize("name", ["samples", "rollouts"])
def test_data_of_an_incomplete_last_line_leave_it_out(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    with open(run / f"{name}.jsonl", "a") as file:
        file.write('{"step": 60, "prom')
    assert len(browser_data(read_study(run)).rows) == 27
