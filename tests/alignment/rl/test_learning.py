"""Tests that every algorithm learns a task with a verifiable reward: to generate odd tokens."""

import json

import numpy as np
import pytest

from alignment.rl.algorithms import ALGORITHMS
from tests.alignment.chat_model import make_model
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
STEPS = 20


def learn(model, place, algorithms):
    """Return the mean reward of each step of every algorithm, from the same weights."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl.critic import Critic
    from alignment.rl.rollouts import RewardResult
    from alignment.rl.tasks import PromptTask, RLSettings
    from alignment.rl.train import RLComponents, train
    from alignment.training.loop import TrainingSchedule
    from alignment.training.training_run import TrainingRun
    from megatron_ext.inference.sampling import Sampling

    tasks = [PromptTask(str(n), [5, n, 7], None) for n in range(24)]

    def reward(groups, check):
        return [
            [RewardResult(sum(t % 2 for t in r.tokens) / 6, "score") for r in rollouts]
            for _, rollouts in groups
        ]

    optimization, layout = Optimization(lr=2e-2, steps=10 * STEPS), MegatronLayout(micro_batch=8)
    engine = MegatronEngine(model, optimization, layout)
    start = [(name, tensor.clone()) for name, tensor in engine.parameters()]
    result = {}
    for name in algorithms:
        engine.load_parameters(start)
        settings = RLSettings(
            ALGORITHMS[name], 8, 4, 1, 64, Sampling(6, stop_at_eod=False), overlong_margin=1
        )
        with TrainingRun(place / name, engine, {}) as run:
            critic = None
            if ALGORITHMS[name].advantages is None:
                critic = Critic(MegatronEngine(model, optimization, layout), set(range(32)))
            rl = RLComponents(
                run=run, engine=engine, tasks=tasks, reward=reward, settings=settings, seed=0,
                critic=critic,
            )  # fmt: skip
            train(rl, TrainingSchedule(STEPS, 100, 100))
        lines = (place / name / "metrics.jsonl").read_text().splitlines()
        result[name] = [json.loads(line)["reward"] for line in lines]
    return result


def test_every_algorithm_learns_a_verifiable_reward(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=64)
    names = list(ALGORITHMS)
    [result] = run_ranks(learn, 1, tmp_path / "model", tmp_path, names, timeout=240)
    for name, rewards in result.items():
        assert np.mean(rewards[:2]) < 0.7, name
        assert np.mean(rewards[-2:]) > 0.95, (name, rewards)
