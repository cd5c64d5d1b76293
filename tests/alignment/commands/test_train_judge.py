"""Tests of `train-judge`: equal on every layout, exact after interruptions, and correct."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.alignment.chat_model import BRIEF, gold, make_model, responses, write_rows
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
LENGTH = 192


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a model, and items with gold verdicts."""
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder / "model", num_hidden_layers=1, max_position_embeddings=LENGTH)
    for name, count, seed in (("train", 160, 1), ("held_out", 40, 2)):
        items = responses(count, seed)
        write_rows(folder / f"{name}.jsonl", items)
        write_rows(folder / f"{name}.gold.jsonl", gold(items))
    (folder / "pointwise-brief.txt").write_text(BRIEF)
    return folder


def engine_of(folder, kind, layout):
    from alignment.engines.protocol import Optimization

    optimization = Optimization(lr=3e-3, steps=12, warmup=1)
    if kind == "deepspeed":
        from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

        return DeepSpeedEngine(folder / "model", optimization, ZeroSettings(**layout))
    from alignment.engines.megatron import MegatronEngine, MegatronLayout

    return MegatronEngine(folder / "model", optimization, MegatronLayout(**layout))


def labelled(folder, name="train"):
    from alignment.judges.training_examples import read_labeled_questions

    return read_labeled_questions([folder / f"{name}.jsonl"], [folder / f"{name}.gold.jsonl"], True)


def form(folder, thinks):
    from alignment.data.model_tokenizer import load_tokenizer
    from alignment.judges.formats.parsing import Parser
    from alignment.judges.formats.prompts import judge_prompt
    from alignment.judges.kinds.local_judge import TokenizedJudgeFormat

    prompt = judge_prompt(str(folder / "pointwise-brief.txt"), thinks)
    return TokenizedJudgeFormat(prompt, Parser(thinks=thinks), load_tokenizer(folder / "model"))


def odd(rollout):
    return rollout.tokens[0] % 5 == 0


def reinforcement(folder, engine, run, critic=None, before=lambda groups: None, fails=odd):
    from alignment.rl.algorithms import ALGORITHMS
    from alignment.rl.rollouts import RewardResult
    from alignment.rl.tasks import PromptTask, RLSettings
    from alignment.rl.train import RLComponents
    from megatron_ext.inference.sampling import Sampling

    prompts = form(folder, thinks=False)
    tasks = [
        PromptTask(row.gold.item, prompts.prompt_ids(row.question), row) for row in labelled(folder)
    ]

    def reward(groups, check):
        before(groups)
        assert all(r.task == task.id and len(rs) == 4 for task, rs in groups for r in rs)
        return [
            [
                # Some items have no judgment; odd tokens are good.
                RewardResult(None, "failed")
                if fails(rollout)
                else RewardResult(sum(token % 2 for token in rollout.tokens) / 8, "score")
                for rollout in rollouts
            ]
            for task, rollouts in groups
        ]

    algorithm = ALGORITHMS["ppo" if critic else "grpo"]
    settings = RLSettings(
        algorithm, 6, 4, 2, LENGTH, Sampling(8), generation_batch_size=8, max_unrewarded=0.9
    )
    return RLComponents(
        run=run, engine=engine, tasks=tasks, reward=reward, settings=settings, seed=3, critic=critic
    )


def a_few_steps(folder, place, kind, layout):
    """Return metrics and weights of supervised steps and of reinforcement, also with a critic."""
    from alignment.judges.training_examples import encode
    from alignment.rl.critic import Critic
    from alignment.rl.train import train
    from alignment.training.loop import TrainingSchedule
    from alignment.training.sft import SupervisedStep
    from alignment.training.training_run import TrainingRun

    engine = engine_of(folder, kind, layout)
    samples = encode(labelled(folder), form(folder, False), LENGTH, None).samples
    step = SupervisedStep(engine, samples, 10, LENGTH, seed=3)
    results = [step(number) for number in range(2)]
    with TrainingRun(place, engine, {}) as run:
        train(reinforcement(folder, engine, run), TrainingSchedule(2, 100, 100))
        critic = Critic(engine_of(folder, kind, layout), used_tokens={0})
        train(reinforcement(folder, engine, run, critic), TrainingSchedule(4, 100, 100))
    results += rows_of(place)
    models = [critic.engine, engine]
    return results, [
        sum(float(t.double().abs().sum()) for _, t in model.parameters()) for model in models
    ]


def negative_log_likelihood(folder):
    """Return the loss of the first step's completions, by transformers, sample by sample."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignment.judges.training_examples import encode

    samples = encode(labelled(folder), form(folder, False), LENGTH, None).samples
    order = np.random.default_rng((3, 0)).permutation(len(samples))[:10]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total, count = 0.0, 0
    for sample in (samples[i] for i in order):
        tokens = torch.tensor([list(sample.tokens)])
        with torch.no_grad():
            table = model(tokens).logits[0].log_softmax(-1)
        for place in range(sample.prompt, len(sample.tokens)):
            total -= float(table[place - 1, sample.tokens[place]])
            count += 1
    return total / count


SPLITS = [
    (1, "megatron", {"micro_batch": 1}),
    (1, "megatron", {"micro_batch": 4}),
    (2, "megatron", {"micro_batch": 2, "shard_optimizer": True}),
    (2, "megatron", {"tensor": 2}),
    (2, "megatron", {"context": 2}),
    (2, "deepspeed", {"stage": 2}),
]


def test_a_step_is_the_same_on_every_split_and_engine(study, tmp_path):
    names: tuple[str, ...] = ("loss", "grad_norm", "reward", "length", "unrewarded")
    names += ("groups_that_differ", "value", "value_loss", "value_grad_norm")
    names += ("explained_variance", "advantage_std")
    results = []
    for number, (ranks, kind, layout) in enumerate(SPLITS):
        ranked = run_ranks(a_few_steps, ranks, study, tmp_path / str(number), kind, layout)
        each = [
            [*([row.get(name, 0) for name in names] for row in rows), totals]
            for rows, totals in ranked
        ]
        assert all(rank == each[0] for rank in each)  # all ranks report the same
        results.append(each[0])
    assert results[0][0][0] == pytest.approx(negative_log_likelihood(study), abs=1e-5)
    assert results[0][2][3] > 1 and 0 < results[0][2][4] < 0.9  # samples, some without a reward
    assert results[0][5][6] != 0 and results[0][5][9] != 0  # the critic has learned
    for other in results[1:]:
        for row, expected in zip(other, results[0]):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def interrupted(folder, place, how, at):
    """Run four steps of reinforcement; `how` happens while step `at` computes its rewards."""
    from alignment.rl.train import train
    from alignment.training.loop import TrainingSchedule
    from alignment.training.training_run import TrainingRun

    engine = engine_of(folder, "megatron", {"micro_batch": 2})
    calls = []
    generate = engine.generate

    def counted(prompts, *rest):
        calls.append(len(prompts))
        return generate(prompts, *rest)

    engine.generate = counted
    with TrainingRun(place, engine, {"a": 1}) as run:

        def before(groups):
            if run.step == at and how is not None and engine.data_rank == 0:
                how()

        rl = reinforcement(folder, engine, run, before=before)
        schedule = TrainingSchedule(4, save_every=2, evaluate_every=2)
        ended = train(rl, schedule, lambda n: {"n": n})
    return ended, sum(calls)


def die():
    os._exit(9)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def rows_of(place: Path) -> list[dict]:
    """Return the logged rows without times."""
    timed = ("time/", "share/", "seconds", "tokens_per_s")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.mark.parametrize("how", [die, stop])
def test_run_resumes_exactly_in_the_middle_of_a_step(study, tmp_path, how):
    whole, place = tmp_path / "whole", tmp_path / "cut"
    [(ended, sampled)] = run_ranks(interrupted, 1, study, whole, None, 0)
    assert ended == 0 and sampled == 4 * 6 * 4
    if how is die:
        with pytest.raises(Exception, match=r"9|died|exit"):
            run_ranks(interrupted, 1, study, place, die, 3)
    else:
        assert run_ranks(interrupted, 1, study, place, stop, 3)[0][0] == signal.SIGTERM
    folders = {file.parent.name for file in place.glob("rollouts/*/*.jsonl")}
    assert "step_000003" in folders
    [(ended, again)] = run_ranks(interrupted, 2 if how is stop else 1, study, place, None, 0)[:1]
    assert ended == 0
    # The third step's rollouts were on the disk; of the fourth's all had been sampled.
    assert again == 0
    first, second = rows_of(whole), rows_of(place)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for row, other in zip(first, second):
        assert other == (row if how is die else pytest.approx(row, rel=1e-4, abs=1e-5))


def judged_by_a_poor_server(folder, place, dies):
    """Run three steps; calls fail in the first process alone, which dies in the third step."""
    from alignment.rl.train import train
    from alignment.training.loop import TrainingSchedule
    from alignment.training.training_run import TrainingRun

    engine = engine_of(folder, "megatron", {"micro_batch": 2})
    with TrainingRun(place, engine, {}) as run:

        def before(groups):
            if dies and run.step == 2:
                os._exit(9)

        fails = odd if dies else lambda rollout: False
        rl = reinforcement(folder, engine, run, before=before, fails=fails)
        train(rl, TrainingSchedule(3, save_every=3, evaluate_every=3))


def test_failures_of_a_trained_step_are_final(study, tmp_path):
    """Later responses were sampled with weights that result from the step."""
    with pytest.raises(Exception, match=r"9|died|exit"):
        run_ranks(judged_by_a_poor_server, 1, study, tmp_path, True)
    before = rows_of(tmp_path)
    assert [row["step"] for row in before] == [1, 2] and before[0]["failed"] > 0
    run_ranks(judged_by_a_poor_server, 1, study, tmp_path, False)
    after = rows_of(tmp_path)
    assert after[:2] == before and after[2]["failed"] == 0


def test_model_of_another_run_is_not_resumed(study, tmp_path):
    from megatron_ext.errors import UserError

    run_ranks(begin, 1, study, tmp_path, {"lr": 3.0}, 0)  # for example without a tracker's key
    run_ranks(begin, 1, study, tmp_path, {"lr": 1.0}, 1)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"lr": 1.0}
    with pytest.raises(UserError, match="was started with another --lr"):
        run_ranks(begin, 1, study, tmp_path, {"lr": 2.0}, 0)


def begin(folder, place, settings, steps):
    from alignment.training.training_run import TrainingRun

    with TrainingRun(place, engine_of(folder, "megatron", {}), settings) as run:
        for _ in range(steps):
            run.finish_step({})
