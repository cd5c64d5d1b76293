"""Tests of the command that compares two files of verdicts, and of the arrays that it computes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from alignment.commands.agreement import main
from alignment.records import Outcome, Prompt, Response, Side, Verdict
from megatron_ext.errors import TooFewResults, UserError


def write(file: Path, records: list[Any]) -> str:
    file.write_text("".join(json.dumps(record.to_row()) + "\n" for record in records))
    return str(file)


def scores(labels: Sequence[float | None], sample: int = 0) -> list[Verdict]:
    bad = {"outcome": Outcome.UNPARSEABLE, "reason": "what?"}
    return [
        Verdict(f"r{i}", sample=sample, **(bad if x is None else {"outcome": "score", "score": x}))  # type: ignore[arg-type]
        for i, x in enumerate(labels)
    ]


def preference(item: str, label: str, swapped: bool = False) -> Verdict:
    """Return a verdict on a pair: A or B, in the order shown, or tie."""
    if label == "tie":
        return Verdict(item, Outcome.TIE, swapped=swapped)
    side = Side.FIRST if (label == "A") != swapped else Side.SECOND
    return Verdict(item, Outcome.PREFERENCE, preferred=side, swapped=swapped)


def measured(folder: Path, first: list[Verdict], second: list[Verdict], *flags: str) -> Any:
    files = [write(folder / "a.jsonl", first), write(folder / "b.jsonl", second)]
    main([*files, "--resamples", "20", "--output", str(folder / "out"), *flags])
    assert (folder / "out" / "agreement.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "out" / "agreement.json").read_text())


def test_scores_are_compared_on_items_that_both_judged_and_by_slice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    a = draw.integers(0, 10, 80).astype(float)
    b = np.clip(a + draw.normal(0, 1.5, 80), 0, 9)
    labels: list[float | None] = [float(x) for x in b]
    labels[3] = labels[70] = None
    prompts = [Prompt(f"p{i // 2}", [{"role": "user", "content": "x"}]) for i in range(80)]  # type: ignore[list-item]
    items = [Response(f"r{i}", prompts[i], "word", f"model {i % 2}") for i in range(80)]
    flags = ["--items", write(tmp_path / "items.jsonl", items), "--resample", "prompt",
             "--slice", "source"]  # fmt: skip
    # Second samples of some items, half of which equal the first.
    again = scores([x if i % 2 else 0.0 for i, x in enumerate(labels)], 1)[60:]
    result = measured(tmp_path, scores([float(x) for x in a]), scores(labels) + again, *flags)
    there = [i for i in range(80) if i not in (3, 70)]
    whole = np.floor(b + 0.5)
    agreement = result["all"]["agreement"]

    def alpha(places: list[int], b: Any, level: Any) -> float:
        return krippendorff.alpha(np.stack([a[places], b[places]]), level_of_measurement=level)

    assert agreement["alpha_interval"]["value"] == pytest.approx(alpha(there, b, "interval"))
    assert agreement["alpha_nominal"]["value"] == pytest.approx(alpha(there, whole, "nominal"))
    theirs = cohen_kappa_score(
        a[there].astype(int), whole[there].astype(int), labels=range(10), weights="quadratic"
    )
    assert agreement["quadratic_kappa"]["value"] == pytest.approx(theirs)
    assert result["all"]["items"] == 80 and result["all"]["judged_by_both"] == 78
    second = result["all"]["second"]
    assert second["malformed_rate"]["value"] == pytest.approx(2 / 100)
    pairs = [whole[i] == (whole[i] if i % 2 else 0) for i in range(60, 80) if i != 70]
    assert second["self_consistency"]["value"] == pytest.approx(np.mean(pairs))
    odd = result["slices"]["source"]["model 1"]
    places = [i for i in there if i % 2]
    assert odd["judged_by_both"] == len(places) == 39
    assert odd["agreement"]["alpha_interval"]["value"] == pytest.approx(
        alpha(places, b, "interval")
    )
    counts = np.array(result["confusion"]["counts"])
    assert counts.sum() == 78 and counts[int(a[0]), int(whole[0])] > 0
    assert sum(bin["items"] for bin in result["calibration"]) == 78
    assert "by source" in capsys.readouterr().out


def test_pairs_have_flips_ties_and_the_side_that_both_orders_prefer(tmp_path: Path) -> None:
    gold = [preference(f"x{i}", "AB"[i % 2]) for i in range(8)] + [preference("x8", "tie")]
    # x0, x1: right in both orders; x2, x3: always the first one; x4 to x7: wrong in both orders.
    second = []
    for i in range(8):
        right = "AB"[i % 2]
        first = right if i < 2 else "A" if i < 4 else "BA"[i % 2]
        other = {"A": "B", "B": "A"}
        second.append(preference(f"x{i}", first))
        second.append(preference(f"x{i}", "A" if 2 <= i < 4 else other[first], swapped=True))
    second.append(preference("x8", "tie"))
    result = measured(tmp_path, gold, second)["all"]
    assert result["second"]["flip_rate"]["value"] == pytest.approx(2 / 8)
    assert result["second"]["tie_rate"]["value"] == pytest.approx(1 / 17)
    assert result["second"]["shown_first_rate"]["value"] == pytest.approx((4 + 6) / 16)
    assert "both orders" in result["first"]["flip_rate"]["reason"]
    # Of 16 answers about pairs with a side: 4 right, and 2 of the 4 that flip.
    assert result["agreement"]["accuracy"]["value"] == pytest.approx(6 / 16)
    sides = [[1, 0] * 4 + [0.5], [1, 0, 0.5, 0.5, 0, 1, 0, 1, 0.5]]
    theirs = krippendorff.alpha(np.array(sides), level_of_measurement="nominal")
    assert result["agreement"]["alpha_nominal"]["value"] == pytest.approx(theirs)
    assert result["agreement"]["exact"]["value"] == pytest.approx(3 / 9)


def test_constant_judge_has_undefined_statistics_with_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured(tmp_path, scores([1, 2, 3]), scores([5, 5, 5]))["all"]["agreement"]
    assert result["spearman"]["value"] is None
    assert "only the label 5" in result["spearman"]["reason"]
    assert result["quadratic_kappa"]["value"] == pytest.approx(0)
    assert "undefined: the second gives only the label 5" in capsys.readouterr().out
    result = measured(tmp_path, scores([5, 5]), scores([5, 5]))["all"]["agreement"]
    for name in ("alpha_interval", "alpha_nominal", "quadratic_kappa", "kendall"):
        assert result[name]["value"] is None and result[name]["reason"], name
    assert result["exact"]["value"] == 1


@pytest.mark.parametrize(
    "first, second, flags, message",
    [
        (scores([1, 2]), [Verdict("z", Outcome.TIE)], [], "have no item in common"),
        (scores([1, 2, 3]), scores([1, 2]), [], "has 1 items that .* or give --common"),
        (scores([1]), scores([None]), [], "has no judgement on these items"),
        (scores([1]), [preference("r0", "A")], [], "one has scores and the other has preferences"),
        (scores([1]) * 2, scores([1]), [], "two verdicts on item 'r0'"),
        ([*scores([1, 2])[:1], preference("r1", "A")], scores([1, 2]), [], "both scores and pref"),
        (scores([1, 2]), scores([1, 2]), ["--slice", "source"], "--slice source requires --items"),
        (scores([1, 2]), scores([1, 2]), ["--resample", "prompt"], "prompt requires --items"),
        ([], scores([1]), [], r"a\.jsonl is empty"),
    ],
)
def test_incomparable_runs_are_refused_in_a_sentence(
    tmp_path: Path, first: Any, second: Any, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        measured(tmp_path, first, second, *flags)
    assert not (tmp_path / "out").exists()


def test_items_of_both_files_are_compared_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured(tmp_path, scores([1, 2, 3, 4]), scores([1, 2]), "--common")
    assert result["all"]["items"] == 2 and result["all"]["agreement"]["exact"]["value"] == 1
    output = capsys.readouterr().out
    assert f"--common omits 2 of the 4 items of {tmp_path / 'a.jsonl'}, which" in output
    measured(tmp_path, scores([1, 2, 3]), scores([1, 2, 3]), "--common")
    assert "omits" not in capsys.readouterr().out


def test_scores_between_0_and_1_without_a_scale_give_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = scores([n / 10 for n in range(11)])
    measured(tmp_path, scores([float(n % 10) for n in range(11)]), unit)
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert f"all 11 scores of {tmp_path / 'b.jsonl'} are between 0 and 1" in error
    assert "add --second-scale 0 1." in error
    for labels in ([0.5] * 8 + [0.1], [0.0] * 20, [0.5] * 20 + [1.5]):  # few, constant, above
        measured(tmp_path, scores(labels), scores(labels))
    measured(tmp_path, unit, unit, "--first-scale", "0", "1", "--second-scale", "0", "1")
    assert "warning" not in capsys.readouterr().err


def test_kappa_of_items_with_one_label_of_gold_is_undefined(tmp_path: Path) -> None:
    first, second = scores([3, 3, 3, 5, 5, 5]), scores([3, 4, 5, 5, 5, 6])
    result = measured(tmp_path, first, second, "--slice", "gold")
    for label, part in result["slices"]["gold"].items():
        kappa = part["agreement"]["quadratic_kappa"]
        assert (
            kappa["value"] is None and f"the first gives only the label {label}" in kappa["reason"]
        )
    assert result["all"]["agreement"]["quadratic_kappa"]["value"] == pytest.approx(
        cohen_kappa_score([3, 3, 3, 5, 5, 5], [3, 4, 5, 5, 5, 6], labels=range(10),
                          weights="quadratic")
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [False, True])
def test_pictures_are_drawn_without_common_items(tmp_path: Path, pairs: bool) -> None:
    first, second = scores([1, None]), scores([None, 2])
    if pairs:
        first[0], second[1] = preference("r0", "A"), preference("r1", "B")
    with pytest.raises(TooFewResults, match="None of the 2 items was judged successfully in both"):
        measured(tmp_path, first, second)
    result = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert result["all"]["judged_by_both"] == 0 and result["calibration"] == []
    assert "no item" in result["all"]["agreement"]["exact"]["reason"]


def test_scores_of_another_scale_are_refused_by_row_or_mapped_from_it(tmp_path: Path) -> None:
    first, second = scores([0, 100, 50, 20]), scores([0, 9, 4.5, 1.8])
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: the score 100 .* with --first-scale"):
        measured(tmp_path, first, second)
    flags = ["--first-scale", "0", "100"]
    with pytest.raises(UserError, match=r"b\.jsonl, row 2: the score 100 .* with --second-scale"):
        measured(tmp_path, first, first, *flags)
    result = measured(tmp_path, first, second, *flags)["all"]["agreement"]
    assert result["absolute_error"]["value"] == pytest.approx(0, abs=1e-12)
    assert result["alpha_interval"]["value"] == pytest.approx(1, rel=1e-12)
    with pytest.raises(UserError, match="--second-scale 3 1 must be two finite numbers"):
        measured(tmp_path, first, second, "--second-scale", "3", "1")


def test_slices_by_length_are_called_by_the_longest_that_they_may_hold(tmp_path: Path) -> None:
    prompt = Prompt("p", [{"role": "user", "content": "x"}])  # type: ignore[list-item]
    lengths = [10, 10, 11, 12, 20, 30]
    items = [Response(f"r{i}", prompt, "word " * length) for i, length in enumerate(lengths)]
    flags = ["--items", write(tmp_path / "items.jsonl", items), "--slice", "length"]
    result = measured(tmp_path, scores([1, 2, 3, 4, 5, 6]), scores([1, 2, 3, 4, 5, 6]), *flags)
    slices = {name: part["items"] for name, part in result["slices"]["length"].items()}
    assert list(slices.items()) == [("up to 10 words", 2), ("up to 14 words", 2), ("longer", 2)]


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"/out is a file, .* another --output"):
        main(["none.jsonl", "no.jsonl", "--output", str(tmp_path / "out")])


def test_a_third_judge_is_compared_with_the_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    gold = draw.integers(0, 10, 80).astype(float)
    worse = np.clip(gold + draw.normal(0, 3, 80), 0, 9)
    better: list[float | None] = np.clip(gold + draw.normal(0, 0.5, 80), 0, 9).tolist()
    better[7] = None
    third = write(tmp_path / "c.jsonl", scores(better))
    files = [write(tmp_path / "a.jsonl", scores(gold.tolist()))]
    files.append(write(tmp_path / "b.jsonl", scores(worse.tolist())))
    main([*files, third, "--resamples", "20", "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "agreement.json").read_text())
    result = report["differences"]["figures"]["alpha_interval"]
    common = [i for i in range(80) if i != 7]
    values = np.array([np.nan if x is None else x for x in better])
    alphas = [
        krippendorff.alpha(np.stack([gold, labels])[:, common], level_of_measurement="interval")
        for labels in (worse, values)
    ]
    assert result["first"]["value"] == pytest.approx(alphas[0])
    assert result["second"]["value"] == pytest.approx(alphas[1])
    assert result["difference"]["value"] == pytest.approx(alphas[1] - alphas[0])
    assert result["p"] == pytest.approx(1 / 21)  # none of 20 permutations is as extreme
    output = capsys.readouterr().out
    assert f"{third} agrees with {tmp_path / 'a.jsonl'} more than {tmp_path / 'b.jsonl'}" in output
    assert "on 79 items that all three judged" in output
    without_gold = [None if i < 60 else x for i, x in enumerate(gold.tolist())]
    write(tmp_path / "a.jsonl", scores(without_gold))
    main([*files, third, "--resamples", "20", "--output", str(tmp_path / "out")])
    assert "on 20 items that all three judged" in capsys.readouterr().out
    main([third, str(tmp_path / "a.jsonl")])  # two files have no such table
    assert "three judged  " not in capsys.readouterr().out


def test_a_file_twice_and_a_scale_without_a_file_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", scores([1.0, 2.0]))
    with pytest.raises(UserError, match=r"occurs twice\. Name the verdicts of different judges"):
        main([file, file])
    with pytest.raises(UserError, match="--third-scale requires a third file"):
        main([file, str(tmp_path / "b.jsonl"), "--third-scale", "0", "1"])
