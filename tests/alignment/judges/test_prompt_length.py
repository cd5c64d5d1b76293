"""Tests that unusable data of a judge is refused before a model is loaded."""

from pathlib import Path

import pytest

from alignment.judges.training_examples import encode, read_labeled_questions
from alignment.judges.verifiable_rewards import judge_reward
from alignment.records import Message, Outcome, Pair, Prompt, Side, Verdict
from megatron_ext.errors import TooFewResults, UserError
from tests.alignment.chat_model import (
    BRIEF,
    gold,
    make_model,
    responses,
    write_rows,
)


def test_validation_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    from alignment.commands.train_judge import main

    make_model(tmp_path)
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    flags = ["--stage", "sft", "--thinking", "asked", "--model", str(tmp_path)]
    flags += ["--template", str(tmp_path / "pointwise-brief.txt"), "--run-dir", str(tmp_path / "r")]
    for seed, name in enumerate(("", "validation-")):
        items = responses(8, seed)
        flags += [f"--{name}input", str(write_rows(tmp_path / f"{name}items.jsonl", items))]
        flags += [f"--{name}gold", str(write_rows(tmp_path / f"{name}gold.jsonl", gold(items)))]
    with pytest.raises(UserError, match=r"Every question .* the 0 tokens that --seq-length 64"):
        main([*flags, "--seq-length", "64", "--max-new-tokens", "96"])


@pytest.fixture
def judging(tmp_path: Path) -> list[str]:
    """Return the flags of a judge's training, without those of gold."""
    make_model(tmp_path)
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    items = write_rows(tmp_path / "items.jsonl", responses(20))
    return ["--stage", "sft", "--model", str(tmp_path), "--run-dir", str(tmp_path / "run"),
            "--template", str(tmp_path / "pointwise-brief.txt"), "--input", str(items)]  # fmt: skip


def scored(tmp_path: Path, *scores: float) -> Path:
    items = responses(len(scores))
    rows = [Verdict(i.id, Outcome.SCORE, float(s)) for i, s in zip(items, scores)]
    return write_rows(tmp_path / "gold.jsonl", rows)


def test_gold_outside_of_0_to_9_is_refused_by_row_or_mapped_from_its_scale(
    tmp_path: Path, judging: list[str]
) -> None:
    from alignment.commands.train_judge import main

    for high in (100, 10, -1):
        file = scored(tmp_path, 3, 5, high)
        message = rf"gold\.jsonl, row 3: the score {high} is outside of the scale from 0 to 9"
        with pytest.raises(UserError, match=f"{message}. State the scale .* --gold-scale"):
            main([*judging, "--gold", str(file)])
    with pytest.raises(UserError, match=r"row 3: the score 10 .* from 0 to 5"):
        main([*judging, "--gold", str(scored(tmp_path, 3, 5, 10)), "--gold-scale", "0", "5"])
    with pytest.raises(UserError, match="--gold-scale 5 0"):
        main([*judging, "--gold", str(file), "--gold-scale", "5", "0"])
    items = str(write_rows(tmp_path / "three.jsonl", responses(3)))
    result = read_labeled_questions([items], [str(scored(tmp_path, 1, 5.5, 10))], True, [1, 10])
    assert [row.gold.score for row in result] == pytest.approx([0, 4.5, 9], rel=1e-12)
    assert [row.label for row in result] == ["0", "5", "9"]
    # The best answer to the best of gold has the best reward.
    best = {"outcome": Outcome.SCORE, "score": 9.0}
    assert judge_reward(best, result[2].gold) == 1.0


def test_too_many_gold_verdicts_without_a_judgment_are_refused(
    tmp_path: Path, judging: list[str]
) -> None:
    from alignment.commands.train_judge import main

    verdicts = gold(responses(20))
    for place in range(5):
        verdicts[place] = Verdict(
            verdicts[place].item, Outcome.FAILED, reason=f"cut off after {place}"
        )
    flags = [*judging, "--gold", str(write_rows(tmp_path / "gold.jsonl", verdicts))]
    with pytest.raises(TooFewResults, match=r"5 of 20 verdicts .* cut off after 0 \(5 times\)"):
        main(flags)
    files = [str(tmp_path / "items.jsonl")], [str(tmp_path / "gold.jsonl")]
    assert len(read_labeled_questions(*files, True, max_left_out=0.25)) == 15
    none = [Verdict(v.item, Outcome.FAILED, reason="gone") for v in verdicts]
    flags = [*judging, "--gold", str(write_rows(tmp_path / "none.jsonl", none))]
    with pytest.raises(TooFewResults, match="20 of 20 verdicts of --gold are left out"):
        main([*flags, "--max-left-out", "1"])


def test_training_counts_items_without_a_verdict(
    tmp_path: Path, judging: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from alignment.commands.train_judge import main

    verdicts = gold(responses(20))
    verdicts[0] = Verdict(verdicts[0].item, Outcome.FAILED, reason="cut off")
    file = write_rows(tmp_path / "gold.jsonl", verdicts[:8])
    with pytest.raises(
        TooFewResults,
        match=r"13 of 20 examples of --input and --gold are left out, more than --max-left-out 0.2;"
        r" most often: no verdict in --gold \(12 times\)",
    ):
        main([*judging, "--gold", str(file)])
    assert "12 of 20 items" in capsys.readouterr().out
    rows = read_labeled_questions([str(tmp_path / "items.jsonl")], [str(file)], True, None, 0.65)
    assert len(rows) == 7
    printed = capsys.readouterr().out
    assert "have no verdict in --gold, and 1 of 8 verdicts have no judgment" in printed


def test_training_refuses_mostly_too_long_examples(tmp_path: Path, judging: list[str]) -> None:
    from alignment.commands.train_judge import main

    template = "=== user ===\n{mark} {prompt} {response_a} {response_b} Which, A or B? {answer}\n"
    (tmp_path / "pairwise-brief.txt").write_text(template)
    prompt = Prompt("p", (Message("user", "say good"),))
    pairs = [Pair(f"x{n}", prompt, "good " * (5 if n < 4 else 300), "bad " * 5) for n in range(20)]
    verdicts = [Verdict(p.id, Outcome.PREFERENCE, None, Side.FIRST) for p in pairs]
    flags = [*judging[:6], "--template", str(tmp_path / "pairwise-brief.txt")]
    flags += ["--input", str(write_rows(tmp_path / "pairs.jsonl", pairs))]
    flags += ["--gold", str(write_rows(tmp_path / "gold.jsonl", verdicts)), "--seq-length", "300"]
    with pytest.raises(TooFewResults, match=r"32 of 40 .* longer than --seq-length 300, which can"):
        main(flags)
    with pytest.raises(TooFewResults, match=r"more than --max-left-out 0\.79"):
        main([*flags, "--max-left-out", "0.79"])


def test_scores_between_labels_are_taught_as_the_nearest_and_counted(
    tmp_path: Path, judging: list[str]
) -> None:
    from alignment.commands.judge_setup import load_judge_format
    from alignment.commands.train_judge_config import parse

    file = str(scored(tmp_path, 7.5, 7.4, 3, 0.5))
    items = str(write_rows(tmp_path / "four.jsonl", responses(4)))
    rows = read_labeled_questions([items], [file], True)
    assert [row.label for row in rows] == ["8", "7", "3", "1"]
    config = parse([*judging, "--gold", file])
    form = load_judge_format(config.model, config.format, False)
    encoded = encode(rows, form, 512, None)
    assert encoded.rounded == 3
    assert "3 of a score between two labels, trained with the nearest" in encoded.summary()
