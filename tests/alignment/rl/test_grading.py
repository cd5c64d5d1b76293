"""Tests of the evaluation on held-out prompts without a policy, also when judges fail."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from alignment.data.model_tokenizer import load_tokenizer
from alignment.monitors.training_monitor import Monitor
from alignment.records import Message, Outcome, Prompt, Response, Verdict
from alignment.rl.gaming_alarm import GamingAlarm
from alignment.rl.grading import Grader
from alignment.rl.response_monitor import ResponseMonitor, append_rollouts
from alignment.rl.rollouts import Rollout
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from tests.alignment.chat_model import make_model
from tests.distributed import run_ranks

PROMPTS = [Prompt(f"p{i}", (Message("user", f"say {i}"),)) for i in range(10)]


def grader_in(folder, model=None):
    if model is None:
        model = folder / "model"
        make_model(model, num_hidden_layers=1, max_position_embeddings=128)
    run: Any = SimpleNamespace()
    return Grader(
        SimpleNamespace(), load_tokenizer(model, None), PROMPTS, Sampling(12),
        {"proxy": [], "gold": []}, folder, template={}, reference=None, length=96,
        generation_batch_size=4,
        monitor=ResponseMonitor(run, Monitor()), alarm=GamingAlarm(gap=0.5, window=3),
        check=lambda: None, writes=True,
    )  # fmt: skip


@pytest.fixture
def grader(tmp_path):
    return grader_in(tmp_path)


def share(proxy, gold, prompts=PROMPTS):
    """Return a rank's part of a grading in which nothing failed permanently."""
    responses = [Response(f"{p.id}-0", p, f"yes {p.id}") for p in prompts]
    rollouts = [Rollout(p.id, 0, [1, 2], [0.0, 0.0], True) for p in prompts]
    return responses, rollouts, {"proxy": proxy, "gold": gold}, [], {"proxy": [], "gold": []}


def test_gap_is_0_if_a_judge_fails_on_poor_responses(grader):
    """Proxy and gold agree where both judge; the proxy fails on more and more poor responses."""
    gold = [2.0] * 4 + [6.0] * 6
    rows = []
    for step, left_out in enumerate((0, 1, 2, 3)):
        proxy = [None] * left_out + gold[left_out:]
        row = grader._row(step, [share(proxy, gold)])
        assert row["grade/gap"] == 0
        assert row["grade/proxy_unjudged"] == left_out / 10 and row["grade/gold_unjudged"] == 0
        rows.append(row)
    assert not grader.alarm.raised(rows)
    alone = grader._row(4, [share([None] * 10, gold)])
    assert alone["grade/gap"] is None and alone["grade/proxy"] is None
    assert alone["grade/gold"] == pytest.approx(4.4)  # The score is reported nevertheless.


def test_gold_scores_equal_within_rounding_are_a_tie(grader):
    """Under pairwise rewards, the same response is scored in another batch."""
    grader.pairwise = True
    grader._row(0, [share([0.5] * 10, [7.3] * 10)])
    scores = [7.300002, 7.299998, 7.31, 7.29, 7.3, *[7.3] * 5]
    row = grader._row(1, [share([0.5] * 10, scores)])
    assert row["grade/gold"] == 0.5
    row = grader._row(2, [share([0.5] * 10, [7.300002] * 8 + [7.31] * 2)])
    assert row["grade/gold"] == 0.6


@pytest.mark.parametrize("step, slope", [(1e-7, 0.0), (1e-3, 0.01)])
def test_slope_of_a_gap_that_changes_by_rounding_is_0(grader, step, slope):
    rows = [
        {"step": 10 * i, "grade/proxy": 7 + i * step, "grade/gold": 7, "grade/gap": i * step}
        for i in range(4)
    ]
    assert grader.alarm.slope(rows) == pytest.approx(slope)


def test_written_samples_do_not_depend_on_the_number_of_ranks(grader):
    scores = [float(i) for i in range(10)]
    retained = []
    for ranks in (1, 2, 3):
        shares = [
            share(scores[r::ranks], scores[r::ranks], PROMPTS[r::ranks]) for r in range(ranks)
        ]
        grader._row(0, shares)
        retained.append((grader.folder / "samples.jsonl").read_text())
    assert retained[0] == retained[1] == retained[2]
    assert [json.loads(line)["prompt"] for line in retained[0].splitlines()] == [
        f"p{i}" for i in range(8)
    ]


def test_scores_of_every_held_out_prompt_are_written(grader):
    proxy, gold = [float(i) for i in range(10)], [None, *[3.0] * 9]
    grader._row(0, [share(proxy, gold)])
    grader._row(20, [share(gold, proxy)])
    rows = [json.loads(line) for line in (grader.folder / "grades.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 20]
    assert rows[0]["prompts"] == [prompt.id for prompt in PROMPTS]
    assert rows[0]["scores"] == {"proxy": proxy, "gold": gold}
    assert rows[1]["scores"] == {"proxy": gold, "gold": proxy}


def test_flagged_responses_of_a_step_are_written_first(tmp_path):
    texts = [f"A plain answer {i}." for i in range(9)] + ["I refuse."]
    responses = [Response(f"{p.id}:0", p, text) for p, text in zip(PROMPTS, texts)]
    flags: list[dict[str, tuple[str]]] = [{}] * 9 + [{"refusal": ("I refuse",)}]
    findings: Any = SimpleNamespace(flags=flags)
    append_rollouts(tmp_path, 3, responses, [float(i) for i in range(9)] + [None], findings)
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert [row["id"] for row in rows] == ["p9:0", *(f"p{i}:0" for i in range(7))]
    assert rows[0]["flags"] == ["refusal"] and rows[0]["scores"] == {"reward": None}
    assert rows[1]["step"] == 3 and rows[1]["messages"][0]["content"] == "say 0"


def test_grader_ends_the_run_if_gold_fails_too_often(grader):
    lost = {"proxy": [], "gold": ["status 503"] * 3}
    with pytest.raises(UserError, match=r"--gold failed 3 times on 10 .* status 503\. Check its"):
        grader._require_answers([(*share([1.0] * 10, [1.0] * 10)[:4], lost)])
    lost["gold"].pop()  # as many as are permitted
    grader._require_answers([(*share([1.0] * 10, [1.0] * 10)[:4], lost)])


@pytest.mark.parametrize("damage", [("metrics.jsonl", None), ("first.json", '{"p0": {"te')])
def test_restore_refuses_damaged_files_of_the_first_evaluation(grader, damage):
    grader._row(0, [share([1.0] * 10, [1.0] * 10)])
    (grader.folder / "metrics.jsonl").write_text('{"step": 0, "grade/gap": 0}\n')
    name, text = damage
    if text is None:
        (grader.folder / name).unlink()
    else:
        (grader.folder / name).write_text(text)
    grader._first = {}
    with pytest.raises(UserError, match=r"cannot be read .* another --run-dir"):
        grader.restore(3)


def test_summary_of_several_judges_has_no_agreement():
    from alignment.commands.policy_judges import describe_judges

    def spec(name) -> Any:
        return SimpleNamespace(
            summary=lambda: {"name": name}, read_agreement=lambda: {"alpha_interval": 0.9}
        )

    judges: list[Any] = [SimpleNamespace(identity=name) for name in "ab"]
    description = describe_judges([spec("strong"), spec("weak")], judges)
    assert (
        description is not None
        and description["name"] == "strong + weak"
        and description["agreement"] is None
    )
    assert [each["identity"] for each in description["ensemble"]] == ["a", "b"]
    alone = describe_judges([spec("strong")], judges[:1])
    assert alone is not None and alone["agreement"] == {"alpha_interval": 0.9}


def graded_by_a_gold_that_fails(folder):
    """Return, on a rank, the error message that ends a first grading."""
    grader = grader_in(folder)
    failed = [Verdict(f"{p.id}-0", Outcome.FAILED, reason="no connection") for p in PROMPTS]
    scored = [Verdict(f"{p.id}-0", Outcome.SCORE, 1.0) for p in PROMPTS]
    grader.judges = {
        "proxy": [SimpleNamespace(judge=lambda questions, check: scored)],
        "gold": [SimpleNamespace(judge=lambda questions, check: failed)],
    }
    result = SimpleNamespace(tokens=[1, 2], log_probs=[0.0, 0.0], ended=True)
    grader.policy = SimpleNamespace(
        data_size=1,
        data_rank=0,
        generate=lambda requested, sampling, seeds: [result] * len(requested),
    )
    with pytest.raises(UserError) as caught:
        grader(0)
    return str(caught.value)


def test_grader_counts_a_failed_verdict_once_per_question(tmp_path):
    [description] = run_ranks(graded_by_a_gold_that_fails, 1, tmp_path)
    assert (
        "--gold failed 10 times on 10 held-out responses" in description
        and "no connection" in description
    )
    assert not (tmp_path / "first.json").exists()


def graded_with_others(folder, model):
    """Return, on a rank, metrics of a first evaluation and the prompts of its responses."""
    grader = grader_in(folder, model)
    grader.writes = dist.get_rank() == 0

    def judge(questions, check):
        return [Verdict(q.item.id, Outcome.SCORE, float(q.item.prompt.id[1:])) for q in questions]

    grader.judges = {
        "proxy": [SimpleNamespace(judge=judge)],
        "gold": [SimpleNamespace(judge=judge)],
    }
    result = SimpleNamespace(tokens=[1, 2], log_probs=[0.0, 0.0], ended=True)
    grader.policy = SimpleNamespace(
        data_size=dist.get_world_size(),
        data_rank=dist.get_rank(),
        generate=lambda requested, sampling, seeds: [result] * len(requested),
    )
    return grader(0), sorted(grader._first)


def test_grader_collects_responses_on_the_first_rank_and_metrics_on_all(tmp_path):
    model = tmp_path / "model"
    make_model(model, num_hidden_layers=1, max_position_embeddings=128)
    [(alone, prompts)] = run_ranks(graded_with_others, 1, tmp_path, model)
    rows = run_ranks(graded_with_others, 3, tmp_path, model)
    assert all(row == alone for row, _ in rows)
    assert alone["grade/proxy"] == alone["grade/gold"] == 4.5
    assert [responses for _, responses in rows] == [prompts, prompts[1::3], prompts[2::3]]
