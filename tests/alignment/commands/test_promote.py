"""Tests of the regression test that a retrained judge must pass before it is promoted."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest

from alignment.commands.promote import REFUSED, compare, main
from alignment.records import Message, Outcome, Prompt, Response, Side, Verdict
from megatron_ext.errors import TooFewResults, UserError
from tests.alignment.chat_model import write_rows


def scores(noise, seed, count=300):
    """Return scores at a distance from gold's scores."""
    draw = random.Random(seed)
    gold = [random.Random(i).randrange(10) for i in range(count)]
    values = [min(9.0, max(0.0, g + draw.gauss(0, noise))) for g in gold]
    return [Verdict(str(i), Outcome.SCORE, value) for i, value in enumerate(values)]


@pytest.fixture
def files(tmp_path):
    for name, noise in (("gold", 0.0), ("good", 1.0), ("same", 1.0), ("poor", 3.0)):
        write_rows(tmp_path / f"{name}.jsonl", scores(noise, name))
    for name in ("candidate", "current"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    return tmp_path


def promote(files, old, new=None, *more):
    words = ["--candidate", files / "candidate", "--current", files / "current"]
    for when, judges in (("old", old), ("new", new)):
        for who, judge in zip(("gold", "current", "candidate"), ("gold", *(judges or ()))):
            if judges:
                words += [f"--{when}-{who}", files / f"{judge}.jsonl"]
    return main([str(word) for word in [*words, "--resamples", 300, *more]])


def measured(files, candidate):
    gold, current, other = (str(files / f"{n}.jsonl") for n in ("gold", "good", candidate))
    return compare(gold, current, other, 200)


def in_use(files):
    return json.loads((files / "current" / "config.json").read_text())["name"]


def test_a_judge_that_got_worse_on_the_old_test_set_is_refused(files, capsys):
    assert promote(files, ("good", "poor")) == REFUSED
    assert "may agree less" in capsys.readouterr().out and in_use(files) == "current"
    assert promote(files, ("good", "same"), None, "--margin", 0.06) == 0
    assert in_use(files) == "candidate"
    assert json.loads((files / "current" / "promoted.json").read_text())["from"]
    assert {place.name for place in files.iterdir() if place.is_dir()} == {"candidate", "current"}


def test_on_new_items_it_must_be_better(files, capsys):
    assert promote(files, ("good", "same"), ("good", "same"), "--margin", 0.06) == REFUSED
    assert "no better than the current judge" in capsys.readouterr().out
    assert promote(files, ("poor", "good"), ("poor", "good")) == 0


def test_rounding_is_no_improvement_and_a_loss_of_the_margin_may_be(files, capsys):
    """The candidate has the current judge's scores, nearer to gold by 1e-7, as in another batch."""
    gold, good = scores(0.0, "gold"), scores(1.0, "good")
    near = [
        replace(b, score=b.score + 1e-7 * np.sign(a.score - b.score)) for a, b in zip(gold, good)
    ]
    write_rows(files / "near.jsonl", near)
    assert measured(files, "near").difference.low > 0
    assert promote(files, ("good", "near"), ("good", "near")) == REFUSED
    assert "no better than the current judge" in capsys.readouterr().out
    # 7 of 100 and 5 of 100 unjudged: the difference of floats is above 0.02.
    gold, good = gold[:100], good[:100]
    lost = {"outcome": Outcome.FAILED, "score": None, "reason": "away"}
    for name, count in (("five", 5), ("seven", 7), ("eight", 8)):
        rows = [replace(v, **lost) if i < count else v for i, v in enumerate(good)]
        write_rows(files / f"{name}.jsonl", rows)
    write_rows(files / "gold.jsonl", gold)
    assert promote(files, ("five", "eight")) == REFUSED
    assert promote(files, ("five", "seven")) == 0


def test_gold_that_judged_too_little_or_on_another_scale_promotes_nothing(files):
    gold = scores(0.0, "gold")
    bad = [replace(v, outcome=Outcome.FAILED, score=None, reason="timed out") for v in gold[:30]]
    write_rows(files / "gold.jsonl", [*bad, *gold[30:]])
    with pytest.raises(TooFewResults, match=r"30 of 300 verdicts of .* timed out \(30 times\)"):
        promote(files, ("poor", "good"))
    assert in_use(files) == "current"
    assert promote(files, ("poor", "good"), None, "--max-failed", 0.1) == 0
    write_rows(files / "gold.jsonl", [*gold[:5], replace(gold[5], score=70.0), *gold[6:]])
    with pytest.raises(UserError, match=r"gold\.jsonl, row 6: the score 70 is outside"):
        promote(files, ("poor", "good"))


def test_the_difference_is_of_the_same_items(files):
    result = measured(files, "good")
    assert (result.difference.value, result.difference.low, result.difference.high) == (0, 0, 0)
    result = measured(files, "poor")
    gold, good = scores(0.0, "gold"), scores(1.0, "good")
    pairs = np.array([[a.score or 0.0, b.score or 0.0] for a, b in zip(gold, good)])
    observed = ((pairs[:, 0] - pairs[:, 1]) ** 2).mean()
    everything = pairs.flatten()
    count = len(everything)
    expected = ((everything[:, None] - everything) ** 2).sum() / (count * (count - 1))
    assert result.current.value == pytest.approx(1 - observed / expected)
    current, candidate = result.current.value, result.candidate.value
    assert current is not None and candidate is not None
    assert result.difference.value == pytest.approx(candidate - current)


def test_files_that_do_not_go_together_are_refused(files):
    write_rows(files / "few.jsonl", scores(1.0, 3, 20))
    pairs = [Verdict(str(i), Outcome.PREFERENCE, preferred=Side.FIRST) for i in range(300)]
    write_rows(files / "pairs.jsonl", pairs)
    for other, message in (("few", "Annotate the same items"), ("pairs", "preferences")):
        with pytest.raises(UserError, match=message):
            promote(files, ("good", other))
    with pytest.raises(UserError, match="go together"):
        promote(files, ("good", "same"), None, "--new-gold", str(files / "gold.jsonl"))
    (files / "candidate" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        promote(files, ("good", "same"))


def silent_where(verdicts, hard):
    return [
        Verdict(v.item, Outcome.UNPARSEABLE, reason="no label") if hard(v) else v for v in verdicts
    ]


def test_judge_does_not_gain_by_failing_on_hard_items(files, capsys):
    """The candidate equals the current judge but fails where that judge is far from gold."""
    gold = {v.item: v.score for v in scores(0.0, "gold")}
    current = scores(1.0, "good")
    evasive = silent_where(current, lambda v: abs(v.score - gold[v.item]) > 0.5)
    write_rows(files / "evasive.jsonl", evasive)
    lost = sum(not v.judged for v in evasive)
    result = measured(files, "evasive")
    assert (result.difference.value, result.items) == (0, len(gold) - lost)
    assert result.unjudged == (0, lost / len(gold))
    assert promote(files, ("good", "evasive"), ("good", "evasive")) == REFUSED
    output = capsys.readouterr().out
    assert f"leaves {lost / len(gold):.1%} unjudged" in output and "no better" in output
    assert in_use(files) == "current"
    # The same or a larger share of judged items is no reason to refuse.
    write_rows(files / "quiet.jsonl", silent_where(current, lambda v: v.item == "7"))
    assert promote(files, ("evasive", "quiet")) == 0


def test_of_pairs_what_one_judge_leaves_out_counts_for_none(files):
    def pairs(wrong, silent=()):
        return [
            Verdict(str(i), Outcome.FAILED, swapped=swapped, reason="away")
            if (i, swapped) in silent
            else Verdict(
                str(i), Outcome.PREFERENCE, swapped=swapped,
                preferred=Side.SECOND if i in wrong else Side.FIRST,
            )
            for i in range(40)
            for swapped in (False, True)
        ]  # fmt: skip

    hard = range(10)
    for name, rows in (
        ("gold", pairs(())),
        ("good", pairs(hard)),
        ("evasive", pairs(hard, {(i, True) for i in hard})),
    ):
        write_rows(files / f"{name}.jsonl", rows)
    result = measured(files, "evasive")
    assert (result.current.value, result.candidate.value, result.items) == (1, 1, 30)
    assert result.unjudged == (0, 10 / 80)


@pytest.mark.parametrize("link", [False, True])
def test_promotion_killed_between_the_renames_is_repaired(files, link):
    current, old = files / "current", files / ".current.old"
    if link:
        current.rename(files / "elsewhere")
        current.symlink_to(files / "elsewhere")
    current.rename(old)
    assert promote(files, ("good", "poor")) == REFUSED
    assert in_use(files) == "current" and not old.exists()
    (old).mkdir()  # a promotion that was killed after both renames
    (old / "config.json").write_text("{}")
    assert promote(files, ("good", "same"), None, "--margin", 0.06) == 0
    assert in_use(files) == "candidate" and not old.exists() and not old.is_symlink()


def test_several_responses_to_a_prompt_are_no_independent_items(files):
    """Four copies of each verdict have the same interval if prompts are resampled."""
    responses = []
    for name in ("gold", "good", "same"):
        rows = scores(0.0 if name == "gold" else 1.0, name, count=60)
        write_rows(files / f"{name}-once.jsonl", rows)
        again = [replace(row, item=f"{row.item}-{n}") for row in rows for n in range(4)]
        write_rows(files / f"{name}-often.jsonl", again)
    for i in range(60):
        prompt = Prompt(f"p{i}", (Message("user", f"say {i}"),))
        responses += [Response(f"{i}-{n}", prompt, "yes") for n in range(4)]
    write_rows(files / "items.jsonl", responses)
    items = str(files / "items.jsonl")

    def width(often, *more):
        gold, good, same = (str(files / f"{n}-{often}.jsonl") for n in ("gold", "good", "same"))
        difference = compare(gold, good, same, 2000, *more).difference
        assert difference.low is not None and difference.high is not None
        return difference.high - difference.low

    assert width("often", items) == pytest.approx(width("once"), rel=0.1)
    assert width("often") < 0.6 * width("once")


def test_a_copy_that_fails_leaves_nothing(files):
    (files / "candidate" / "weights").symlink_to("nowhere")
    (files / f".current.{os.getpid() + 1}.tmp").mkdir()  # a promotion that was killed
    with pytest.raises(UserError, match="cannot be copied next to --current"):
        promote(files, ("good", "same"), None, "--margin", 0.06)
    assert in_use(files) == "current"
    assert {place.name for place in files.iterdir() if place.is_dir()} == {"candidate", "current"}


def test_no_number_is_no_margin(files):
    with pytest.raises(UserError, match="--margin nan must be at least 0"):
        promote(files, ("good", "poor"), None, "--margin", "nan")
