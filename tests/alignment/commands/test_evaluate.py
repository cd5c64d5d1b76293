"""Tests of the comparison of policies by an endpoint, by a rule, and from files of verdicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import beta

from alignment.commands.evaluate import main
from alignment.evaluation.style import counts, covariates, differences
from alignment.evaluation.win_rates import finite
from alignment.record_files import read_all
from alignment.records import Message, Outcome, Pair, Prompt, Response, Side, Verdict
from alignment.statistics.bootstrap import Estimate, estimates
from megatron_ext.errors import TooFewResults, UserError
from tests.alignment.endpoints.endpoint import Endpoint, chat

N = 24


def write(file: Path, records: list[Any]) -> str:
    file.write_text("".join(json.dumps(record.to_row()) + "\n" for record in records))
    return str(file)


def policy(folder: Path, name: str, texts: list[str]) -> str:
    prompts = [Prompt(f"p{i}", [Message("user", f"Say {i}")]) for i in range(len(texts))]
    rows = [Response(f"{name}-{p.id}", p, text, name) for p, text in zip(prompts, texts)]
    return write(folder / f"{name}.jsonl", rows)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Write responses that begin with the digit that the endpoint gives them as their score."""
    draw = np.random.default_rng(0)
    return [
        policy(tmp_path, name, [f"<{draw.integers(low, high)}, {name} {i}>" for i in range(N)])
        for name, low, high in (("base", 0, 6), ("good", 3, 10), ("bad", 0, 4))
    ]


def evaluated(folder: Path, files: list[str], *flags: object) -> Any:
    main(["--responses", *files, "--baseline", files[0], "--output", str(folder / "out"),
          "--resamples", "200", *map(str, flags)])  # fmt: skip
    return json.loads((folder / "out" / "evaluation.json").read_text())


def test_two_judges_are_called_once_and_their_statistics_equal_numpy(
    tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Endpoint() as scorer, Endpoint() as biased:
        biased.answer = lambda text: chat("A")  # always the first response
        flags = ["--first-wait", 0.01, "--name", "digits", "--judge", scorer.url, "--model", "m",
                 "--ask", "scores", "--judge", biased.url, "--model", "m", "--name", "position",
                 "--ask", "preferences"]  # fmt: skip
        result = evaluated(tmp_path, files, *flags)
        assert len(scorer.bodies) == 3 * N and len(biased.bodies) == 2 * 2 * N
        again = evaluated(tmp_path, files, *flags)
        assert again == result and len(scorer.bodies) == 3 * N and len(biased.bodies) == 4 * N
    assert result["policies"] == ["base", "good", "bad"] and result["prompts"] == N
    digits = {Path(f).stem: np.array([int(r.text[1]) for r in read_all(Path(f), Response)])
              for f in files}  # fmt: skip
    scores = result["judges"]["digits"]["scores"]["policies"]
    for name, own in digits.items():
        assert scores[name]["mean"]["value"] == pytest.approx(own.mean())
        assert scores[name]["judged"] == N
        # Near the interval of the normal distribution.
        error = own.std(ddof=1) / np.sqrt(N)
        assert scores[name]["mean"]["low"] == pytest.approx(own.mean() - 1.96 * error, abs=error)
        assert scores[name]["mean"]["high"] == pytest.approx(own.mean() + 1.96 * error, abs=error)
    gain = digits["good"] - digits["base"]
    assert scores["good"]["gain"]["value"] == pytest.approx(gain.mean())
    assert "gain" not in scores["base"]
    preferences = result["judges"]["position"]["preferences"]["policies"]
    for name in ("good", "bad"):
        of = preferences[name]
        assert of["win_rate"]["value"] == 0.5 and of["flips"]["value"] == 1.0
        assert of["strength"]["value"] == pytest.approx(0)
    output = capsys.readouterr().out
    assert "scores of digits" in output and "position, against base" in output


def test_verdicts_of_files_need_no_judge_and_bad_ones_leave_the_figures(
    tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    begin = ["--responses", *files, "--baseline", files[0]]
    assert main([*begin, "--output", str(out)]) == 0
    assert "annotate them" in capsys.readouterr().out
    pairs = read_all(out / "pairs.jsonl", Pair)
    assert [pair.source for pair in pairs] == ["good"] * N + ["bad"] * N
    verdicts, outcomes = [], {"good": [], "bad": []}  # type: ignore[var-annotated]
    for i, pair in enumerate(pairs):
        orders = []
        for swapped in (False, True):
            wins = pair.source == "good" or i % 4 == 0
            side = Side.FIRST if wins else Side.SECOND
            if i % 8 == 3 and swapped:  # no answer in one order: the pair does not count
                verdicts.append(Verdict(pair.id, Outcome.FAILED, swapped=True, reason="timed out"))
            elif i % 8 == 5 and swapped:
                verdicts.append(Verdict(pair.id, Outcome.TIE, swapped=True))
                orders.append(0.5)
            else:
                verdicts.append(Verdict(pair.id, Outcome.PREFERENCE, None, side, swapped))
                orders.append(float(wins))
        if len(orders) == 2:
            outcomes[pair.source].append(np.mean(orders))
    scores = [Verdict(r.id, Outcome.SCORE, float(r.text[1]))
              for r in read_all(out / "responses.jsonl", Response)]  # fmt: skip
    scores[1] = Verdict(scores[1].item, Outcome.UNPARSEABLE, reason="two labels")
    verdict_files = [write(tmp_path / f"v{i}.jsonl", rows)
             for i, rows in enumerate((verdicts, scores[:30], scores[30:]))]  # fmt: skip
    result = evaluated(
        tmp_path,
        files,
        "--verdicts",
        *(f"j={file}" for file in verdict_files),
        "--max-failed",
        "0.1",
    )
    output = capsys.readouterr().out
    assert f"{N - 3} of {N} (3 failed calls)" in output
    assert f"{N - 1} of {N} (1 malformed answer)" in output
    of = result["judges"]["j"]["preferences"]["policies"]
    for name, won in outcomes.items():
        assert of[name]["win_rate"]["value"] == pytest.approx(np.mean(won))
        assert of[name]["judged"] == len(won) == N - 3 and of[name]["failed"] == 3
        assert of[name]["strength"]["value"] == pytest.approx(logit(np.mean(won)))
    assert result["judges"]["j"]["scores"]["policies"]["base"]["judged"] == N - 1
    assert result["judges"]["j"]["scores"]["policies"]["base"]["malformed"] == 1
    with pytest.raises(TooFewResults, match=r"6 of 96 preferences .* timed out \(6 times\)"):
        main([*begin, "--verdicts", f"j={verdict_files[0]}"])
    tolerant = ["--verdicts", f"j={verdict_files[0]}", "--max-failed", "0.1"]
    assert main([*begin, *tolerant]) == 0  # no verdicts and no files
    with pytest.raises(UserError, match="lacks 42 of 72 items"):
        main([*begin, "--verdicts", f"j={verdict_files[1]}"])
    main([*begin, "--verdicts", f"j={verdict_files[1]}", "--common", "--resamples", "5"])
    capsys.readouterr()


def test_policy_that_always_wins_has_a_limit_with_its_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (Path(__file__).read_text() * 8).split()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    files = [
        policy(tmp_path, "base", ["no"] * N),
        policy(tmp_path, "good", [f"Say {i}: {' '.join(words[i : i + 20])}." for i in range(N)]),
    ]
    result = evaluated(tmp_path, files, "--judge", "rule", "--rule-text", text)
    of = result["judges"]["rule"]["preferences"]["policies"]["good"]
    for kind in ("strength", "controlled"):
        assert of[kind]["value"] is None and of[kind]["high"] is None
        assert f"won on all {N} prompts" in of[kind]["reason"]
    # Clopper and Pearson's interval of N wins out of N.
    assert of["strength"]["low"] == pytest.approx(logit(beta.ppf(0.025, N, 1)))
    assert of["controlled"]["low"] is None
    assert "∞" in capsys.readouterr().out


def test_policy_without_a_judgment_has_no_figures_of_others(
    tmp_path: Path, files: list[str]
) -> None:
    out = tmp_path / "out"
    main(["--responses", *files, "--baseline", files[0], "--output", str(out)])
    verdicts = []
    for i, pair in enumerate(read_all(out / "pairs.jsonl", Pair)):
        for swapped in (False, True):
            side = Side.FIRST if i % 3 else Side.SECOND
            verdicts.append(
                Verdict(pair.id, Outcome.PREFERENCE, None, side, swapped)
                if pair.source == "good"
                else Verdict(pair.id, Outcome.FAILED, swapped=swapped, reason="timed out")
            )
    file = write(tmp_path / "v.jsonl", verdicts)
    of = evaluated(tmp_path, files, "--verdicts", f"j={file}", "--max-failed", "0.5")
    of = of["judges"]["j"]["preferences"]
    good, bad = of["policies"]["good"], of["policies"]["bad"]
    assert good["strength"]["value"] == pytest.approx(logit(2 / 3))
    assert good["controlled"]["value"] is not None
    for kind in ("win_rate", "strength", "controlled"):
        assert bad[kind]["value"] is None and "judged" in bad[kind]["reason"]


def test_infinite_resamples_are_no_finite_limit() -> None:
    wins = np.ones(40)
    wins[0] = 0.0

    def strength(places: Any) -> float:
        rate = wins[places].mean()
        return float(logit(rate)) if rate < 1 else np.inf

    groups = list(np.arange(40)[:, None])
    result = finite(estimates({"x": strength}, groups, 400)["x"], 40, True)
    assert result.value == pytest.approx(logit(39 / 40))
    assert result.high is None and "no upper limit" in result.reason
    assert result.low == pytest.approx(logit(36 / 40), abs=0.5)
    lost = finite(Estimate(-np.inf), 10, True)
    assert lost.low is None and lost.high == pytest.approx(-logit(0.025**0.1))


def test_style_is_counted_outside_of_code() -> None:
    text = "# Head\n\n1. **one** two\n- x\n```\n# no head\n- no item\n```\n__b__"
    assert counts(text)[1:] == [1, 2, 2]
    prompt = Prompt("p", [Message("user", "x")])
    pairs = [Pair("a", prompt, "# one two three", "one"), Pair("b", prompt, "one two", "")]
    result = differences(pairs)
    assert result[0, 0] == pytest.approx((4 - 1) / (4 + 1)) and result[1, 0] == 1
    assert result[0, 1] == pytest.approx(0.25 / 1.25)
    scaled, names = covariates(pairs)
    assert names == ["length", "headers"]
    assert (scaled**2).mean(axis=0) == pytest.approx(1)


def test_style_that_differs_by_rounding_is_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.array([[0.5, 1e-16, 0.0, 0.0], [-0.5, -2e-17, 0.0, 1e-6]])
    monkeypatch.setattr("alignment.evaluation.style.differences", lambda pairs: noise)
    assert covariates([])[1] == ["length", "bold"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--baseline", "x.jsonl"], "must be one of the files"),
        (["--judge", "rule"], r"a text to compare with\. Add --rule-text"),
        (
            ["--judge", "rule", "--template", "pointwise"],
            "either for scores or for pref|at an",
        ),
        (["--judge", "rule", "--judge", "rule"], "Two judges have the name rule"),
        (["--verdicts", "nofile"], "must have the form NAME=FILE"),
        (["--resamples", "0"], "must be at least 1"),
        (["--jud", "rule"], "--jud is not a flag of evaluate. Did you mean --judge"),
    ],
)
def test_refusals(tmp_path: Path, files: list[str], change: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--responses", *files, "--baseline", files[0], "--output", str(tmp_path), *change])


def test_policies_that_cannot_be_compared_are_refused(tmp_path: Path, files: list[str]) -> None:
    def refused(file: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            main(["--responses", files[0], file, "--baseline", files[0], "--output", str(tmp_path)])

    short = policy(tmp_path, "short", ["x"] * (N - 4))
    refused(short, "base answered 4 prompts that another")
    refused(policy(tmp_path / "..", "base", ["x"] * N), "is from 'base', like another file")
    mixed = read_all(Path(files[1]), Response)[:1] + read_all(Path(files[2]), Response)[1:]
    refused(write(tmp_path / "mixed.jsonl", mixed), "'bad' and of 'good'")
    same = [Response(f"base-p{i}", Prompt(f"p{i}", [Message("user", f"Say {i}")]), "x", "c")
            for i in range(N)]  # fmt: skip
    refused(write(tmp_path / "same.jsonl", same), "have the id 'base-p0'")
    other = [Response(f"o{i}", Prompt(f"p{i}", [Message("user", "else")]), "x", "o")
             for i in range(N)]  # fmt: skip
    refused(write(tmp_path / "other.jsonl", other), "'p0' differs between")
    rubric = [Response(f"r{i}", Prompt(f"p{i}", [Message("user", f"Say {i}")], rubric="Be brief."),
                       "x", "r") for i in range(N)]  # fmt: skip
    refused(write(tmp_path / "rubric.jsonl", rubric), "'p0' differs between .* rubric")


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    words = ["--responses", "none.jsonl", "no.jsonl", "--baseline", "no.jsonl"]
    with pytest.raises(UserError, match=r"/out is a file, .* another --output"):
        main([*words, "--output", str(tmp_path / "out")])
