"""A retrained judge is promoted only past the regression gate."""

import json
import random

import numpy as np
import pytest

from alignment.judges.promote import REFUSED, compare, main
from alignment.records import Outcome, Side, Verdict
from megatron_ext.errors import UserError
from tests.alignment.chat_model import write_rows


def scores(noise, seed, count=300):
    """Scores of a judge that is so far from gold's."""
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


def test_the_difference_is_of_the_same_items(files):
    found = measured(files, "good")
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    found = measured(files, "poor")
    gold, good = scores(0.0, "gold"), scores(1.0, "good")
    pairs = np.array([[a.score or 0.0, b.score or 0.0] for a, b in zip(gold, good)])
    observed = ((pairs[:, 0] - pairs[:, 1]) ** 2).mean()
    everything = pairs.flatten()
    count = len(everything)
    expected = ((everything[:, None] - everything) ** 2).sum() / (count * (count - 1))
    assert found.current.value == pytest.approx(1 - observed / expected)
    current, candidate = found.current.value, found.candidate.value
    assert current is not None and candidate is not None
    assert found.difference.value == pytest.approx(candidate - current)


def test_files_that_do_not_go_together_are_refused(files):
    write_rows(files / "few.jsonl", scores(1.0, 3, 20))
    pairs = [Verdict(str(i), Outcome.PREFERENCE, preferred=Side.FIRST) for i in range(300)]
    write_rows(files / "pairs.jsonl", pairs)
    for other, told in (("few", "annotate the same items"), ("pairs", "preferences")):
        with pytest.raises(UserError, match=told):
            promote(files, ("good", other))
    with pytest.raises(UserError, match="go together"):
        promote(files, ("good", "same"), None, "--new-gold", str(files / "gold.jsonl"))
    (files / "candidate" / "config.json").unlink()
    with pytest.raises(UserError, match="is no Hugging Face folder"):
        promote(files, ("good", "same"))
