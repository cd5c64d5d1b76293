"""Tests of resuming after kills and failures, and of the prompts of each step."""

import json
import os
import signal
from dataclasses import dataclass

import pytest

from alignment.rl.algorithms import ALGORITHMS
from alignment.rl.metrics import StepTimes
from alignment.rl.rollouts import RewardResult, RolloutStore
from alignment.rl.tasks import PromptOrder, PromptTask, RLSettings
from alignment.rl.train import RLComponents, collect_groups, train
from alignment.training.loop import TrainingSchedule, fit
from alignment.training.run_settings import lasting_settings
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from tests.alignment.chat_model import make_model
from tests.distributed import run_ranks

LENGTH = 64


def engine_of(model):
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization

    return MegatronEngine(model, Optimization(lr=1e-3, steps=40, warmup=1), MegatronLayout())


def learner(engine):
    """Train one supervised step, the same in every run."""
    from alignment.engines.batch import TokenSample
    from alignment.training.sft import SupervisedStep

    samples = [TokenSample([n + 1, n + 2, n + 3], 1) for n in range(16)]
    return SupervisedStep(engine, samples, 4, LENGTH, seed=1)


def rows_of(place):
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def killed_saves(model, place):
    """Write unfinished saves: complete in `place`, with half a folder, with four failures."""
    engine = engine_of(model)
    start = [(name, tensor.clone()) for name, tensor in engine.parameters()]

    def go(name, steps, stop_at=None, save=None):
        """Train and save every second step; a signal arrives in a step, or saving fails."""
        engine.load_parameters(start)
        engine.step = 0
        engine.save = save or type(engine).save.__get__(engine)
        with TrainingRun(place / name, engine, {}) as run:
            step = learner(engine)

            def train(number):
                if number == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(number)

            return fit(run, TrainingSchedule(steps, 2, 100), train, lambda n: {"n": n})

    def folders(name):
        return sorted(file.name for file in (place / name / "checkpoints").glob("iter_*"))

    # A save of step 7 was killed; the run resumes from 4 and is stopped at 6.
    assert go("half", 20, stop_at=3) == signal.SIGTERM
    assert folders("half") == ["iter_0000004"]
    half = place / "half" / "checkpoints" / "iter_0000007"
    half.mkdir()
    (half / "common.pt").write_bytes(b"torn")
    assert go("half", 20, stop_at=5) == signal.SIGTERM
    assert folders("half") == ["iter_0000006"]
    assert go("half", 8) == 0
    steps = [row["step"] for row in rows_of(place / "half") if "loss" in row]

    # Five saves in a row fail for lack of space; the earlier checkpoint counts.
    assert go("full", 20, stop_at=3) == signal.SIGTERM

    def fail(folder):
        raise UserError("no room")

    for _ in range(5):
        with pytest.raises(UserError, match="no room"):
            go("full", 20, save=fail)
    assert go("full", 8) == 0
    return steps, [row["step"] for row in rows_of(place / "full") if "loss" in row]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("going-on") / "model"
    make_model(folder, num_hidden_layers=1, max_position_embeddings=LENGTH)
    return folder


@pytest.mark.slow
def test_resume_ignores_unfinished_saves(model, tmp_path):
    [result] = run_ranks(killed_saves, 1, model, tmp_path)
    assert result == (list(range(1, 9)), list(range(1, 9)))


def evaluations(model, place):
    engine = engine_of(model)
    start = [(name, tensor.clone()) for name, tensor in engine.parameters()]

    def go(name, plan, stop_at=None):
        engine.load_parameters(start)
        engine.step = 0
        requested = []
        with TrainingRun(place / name, engine, {}) as run:

            def evaluate(number):
                requested.append(number)
                if number == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                    run.check_signals()
                return {"n": number}

            ended = fit(run, plan, learner(engine), evaluate)
        return ended, requested

    def graded(name):
        return [row["n"] for row in rows_of(place / name) if "n" in row]

    # A signal in the last evaluation, then in the first: each evaluation occurs once.
    plan = TrainingSchedule(6, 100, 4, best="n")
    assert go("last", plan, stop_at=6) == (signal.SIGTERM, [0, 4, 6])
    assert graded("last") == [0, 4]
    assert go("last", plan) == (0, [6]) and graded("last") == [0, 4, 6]
    assert json.loads((place / "last" / "best" / "best.json").read_text())["step"] == 6
    assert go("last", plan) == (0, []) and graded("last") == [0, 4, 6]
    assert go("first", TrainingSchedule(2, 100, 4)) == (0, [0, 2])
    for file in (place / "first" / "checkpoints").iterdir():  # as if killed before the first save
        file.unlink() if file.is_file() else file.rename(place / file.name)
    assert go("first", TrainingSchedule(2, 100, 4)) == (0, [0, 2]) and graded("first") == [0, 2]

    # The same cause ends the run again.
    plan = TrainingSchedule(6, 100, 2, stop_when=lambda row: "enough" if row["n"] == 4 else None)
    assert go("ended", plan) == (0, [0, 2, 4])
    assert go("ended", plan) == (0, [])
    return [row["step"] for row in rows_of(place / "ended") if "loss" in row]


@pytest.mark.slow
def test_resume_evaluates_each_step_once_and_stays_ended(model, tmp_path):
    assert run_ranks(evaluations, 1, model, tmp_path) == [[1, 2, 3, 4]]


def order_of(algorithm, tasks, groups, seed=3):
    settings = RLSettings(ALGORITHMS[algorithm], groups, 2, 1, LENGTH, Sampling(4))
    return PromptOrder(tasks, settings, seed)


@pytest.mark.parametrize("count", [4, 5, 10, 11])
def test_prompt_order_has_different_prompts_within_a_step(count):
    tasks = [PromptTask(str(n), [n], None) for n in range(count)]
    for seed in range(20):
        order = order_of("grpo", tasks, 4, seed)
        draws = [[task.id for task in order.draw(step)] for step in range(9)]
        assert all(len(set(ids)) == 4 for ids in draws)
        each = count // 4
        for begin in range(0, 9 - each, each):  # an epoch has each prompt once
            ids = [i for part in draws[begin : begin + each] for i in part]
            assert len(set(ids)) == len(ids)


def test_prompt_order_refuses_too_few_prompts():
    tasks = [PromptTask(str(n), [n], None) for n in range(3)]
    with pytest.raises(UserError, match="A step requires 4 different prompts, and 3 fit"):
        order_of("grpo", tasks, 4)


def dynamic(model, place):
    """Train by DAPO with a judge that fails on some prompts and separates responses to others."""
    engine = engine_of(model)
    tasks = [PromptTask(str(n), [n + 1], n) for n in range(12)]

    def reward(groups, check):
        """Return rewards of which a third has failed, a third is equal and a third differs."""
        kinds = {0: (None, None), 1: (1.0, 1.0), 2: (0.0, 1.0)}
        return [
            [
                RewardResult(w, "score" if w is not None else "failed")
                for w in kinds[task.metadata % 3]
            ]
            for task, _ in groups
        ]

    result = []
    with TrainingRun(place, engine, {}) as run:
        settings = RLSettings(
            ALGORITHMS["dapo"], 6, 2, 1, LENGTH, Sampling(3), draws=2, max_unrewarded=1
        )
        rl = RLComponents(
            run=run, engine=engine, tasks=tasks, reward=reward, settings=settings, seed=3
        )
        for step in range(4):
            with RolloutStore(place / f"rollouts-{step}", engine) as store:
                groups, sampled, draws = collect_groups(rl, step, store, StepTimes())
            labels = [task.metadata % 3 for task, _, _ in sampled]
            train(rl, TrainingSchedule(step + 1, 100, 100))
            failed = rows_of(place)[step]["failed"]
            result.append(([task.metadata % 3 for task, _, _ in groups], labels, draws, failed))
    return result


@pytest.mark.slow
def test_dynamic_sampling_prefers_groups_that_differ_and_counts_all_failures(model, tmp_path):
    [result] = run_ranks(dynamic, 1, model, tmp_path)
    assert any(drawn.count(2) < 6 < len(drawn) for _, drawn, _, _ in result)
    for retained, drawn, draws, failed in result:
        assert (
            draws == 2 and len(retained) == 6
        )  # a third of the prompts cannot fill a step at once
        assert retained.count(2) == min(6, drawn.count(2))
        assert failed == pytest.approx(drawn.count(0) / len(drawn))


def test_resume_settings_contain_the_content_of_a_template(tmp_path):
    """A template is identified by its content and may be moved."""
    names = ("here-pointwise.txt", "there-pointwise.txt")
    for name, text in zip(names, ("{mark} {response}", "{mark} {response}")):
        (tmp_path / name).write_text(text)

    @dataclass
    class Config:
        template: str

    first, moved = (lasting_settings(Config(str(tmp_path / name))) for name in names)
    (tmp_path / names[0]).write_text("{mark} what is this: {response}")
    assert first == moved != lasting_settings(Config(str(tmp_path / names[0])))
    assert lasting_settings(Config("pointwise")) == {"template": "pointwise"}
