"""Tests of PPO against plain torch, also with a kill between the saves of policy and critic."""

import json
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.alignment.chat_model import make_model
from tests.alignment.engines.engine_runs import saved
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
GROUPS, SIZE, PARTS, SEED = 5, 3, 2, 7
USED_TOKENS = {0, *range(5, 60)}
OF: dict[str, Any] = {"lr": 4e-3, "steps": 8, "warmup": 1}
CRITIC_LR, TRACE, DISCOUNT, CLIP = 8e-3, 0.8, 0.9, 0.05


def prompt(number):
    return [5, number + 6, 7]


def train(model, place, steps, warmup, dies):
    """Return the weights of both models after some steps; may die between their last saves."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl.algorithms import ALGORITHMS
    from alignment.rl.critic import Critic, CriticSettings
    from alignment.rl.rollouts import RewardResult
    from alignment.rl.tasks import PromptTask, RLSettings
    from alignment.rl.train import RLComponents
    from alignment.rl.train import train as train_policy
    from alignment.training.loop import TrainingSchedule
    from alignment.training.training_run import TrainingRun
    from megatron_ext.inference.sampling import Sampling

    layout = MegatronLayout(micro_batch=4)
    engine: Any = MegatronEngine(model, Optimization(**OF), layout)
    other = MegatronEngine(model, Optimization(**OF | {"lr": CRITIC_LR}), layout)
    critic = Critic(other, USED_TOKENS, CriticSettings(DISCOUNT, TRACE, clip=CLIP, warmup=warmup))

    def reward(groups, check):
        return [
            [
                RewardResult(None, "unparseable")
                if r.tokens[0] % 7 == 0
                else RewardResult(sum(t % 2 for t in r.tokens) / 3, "score")
                for r in rollouts
            ]
            for _, rollouts in groups
        ]

    save = engine.save

    def save_or_die(folder):
        if dies and engine.step == PARTS * steps:
            os._exit(9)
        save(folder)

    engine.save = save_or_die
    settings = RLSettings(
        ALGORITHMS["ppo"], GROUPS, SIZE, PARTS, 32, Sampling(6), max_unrewarded=0.9
    )
    tasks = [PromptTask(f"t{number}", prompt(number), None) for number in range(20)]
    with TrainingRun(place, engine, {}, {"critic": other}) as run:
        rl = RLComponents(
            run=run, engine=engine, tasks=tasks, reward=reward, settings=settings, seed=SEED,
            critic=critic,
        )  # fmt: skip
        train_policy(rl, TrainingSchedule(steps, 2, 100))
    return [{n: t.clone() for n, t in e.parameters()} for e in (engine, other)]


class ByHand:
    """Both models by transformers, one response at a time."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        from alignment.engines.protocol import Optimization

        self.models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
        ]
        self.token = self.models[1].config.vocab_size - 1
        with torch.no_grad():
            self.models[1].get_output_embeddings().weight[self.token] = 0
        self.rules = [Optimization(**OF), Optimization(**OF | {"lr": CRITIC_LR})]
        self.adams = [torch.optim.AdamW(m.parameters(), weight_decay=0.0) for m in self.models]
        self.taken = 0

    def log_probs(self, one):
        tokens = torch.tensor([one["prompt"] + one["tokens"]])
        table = self.models[0](tokens).logits[0].log_softmax(-1)
        at = len(one["prompt"]) - 1
        return torch.stack([table[at + i, t] for i, t in enumerate(one["tokens"])])

    def values(self, one):
        logits = self.models[1](torch.tensor([one["prompt"] + one["tokens"]])).logits[0]
        at = len(one["prompt"]) - 1
        return logits[at : at + len(one["tokens"]), self.token]

    def update(self, which, losses):
        model, adam = self.models[which], self.adams[which]
        loss = torch.cat(losses).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = self.rules[which].rate(self.taken)
        adam.step()
        return loss.item()

    def samples(self, place, step):
        """Return the responses of the run with their rewards and old values and advantages."""
        [file] = place.glob(f"rollouts/step_{step:06d}/*.jsonl")
        rows = {r["key"]: r["answer"] for r in map(json.loads, file.read_text().splitlines())}
        order = np.random.default_rng((SEED, step)).permutation(GROUPS * SIZE)
        ids = sorted({row["task"] for key, row in rows.items() if key.startswith("rollout:")})
        for place_, (task, sample) in enumerate((t, s) for t in ids for s in range(SIZE)):
            reward = rows[f"reward:{task}:{sample}"]["reward"]
            if reward is None:
                continue
            one = {**rows[f"rollout:{task}:{sample}"], "prompt": prompt(int(task[1:]))}
            one["part"] = order[place_] % PARTS
            with torch.no_grad():
                one["old"], one["values"] = self.log_probs(one), self.values(one)
            size, values = len(one["tokens"]), one["values"].tolist()
            rewards, after = [0.0] * (size - 1) + [reward], [*values[1:], 0.0]
            errors = [r + DISCOUNT * a - v for r, a, v in zip(rewards, after, values)]
            one["advantages"] = torch.tensor(
                [
                    sum((DISCOUNT * TRACE) ** (j - i) * errors[j] for j in range(i, size))
                    for i in range(size)
                ]
            )
            one["returns"] = one["advantages"] + one["values"]
            yield one

    def step(self, place, step):
        """Return the losses and metrics of a step."""
        samples = list(self.samples(place, step))
        everyone = torch.cat([one["advantages"] for one in samples])
        returns = torch.cat([one["returns"] for one in samples])
        error = returns - torch.cat([one["values"] for one in samples])
        losses: list[list[float]] = [[], []]
        for part in range(PARTS):
            own = [one for one in samples if one["part"] == part]
            each = []
            for one in own:
                new = self.values(one)
                near = one["values"] + (new - one["values"]).clamp(-CLIP, CLIP)
                wrong = [(v - one["returns"]) ** 2 / 2 for v in (new, near)]
                each.append(torch.maximum(*wrong))
            losses[1].append(self.update(1, each))
            each = []
            for one in own:
                gain = (one["advantages"] - everyone.mean()) / everyone.std()
                ratio = (self.log_probs(one) - one["old"]).exp()
                each.append(-torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain))
            losses[0].append(self.update(0, each))
            self.taken += 1
        return {
            "loss": np.mean(losses[0]),
            "value_loss": np.mean(losses[1]),
            "value": float((returns - error).mean()),
            "explained_variance": float(1 - error.var() / returns.var()),
        }


def rows_of(place):
    """Return the logged rows without times."""
    timed = ("time/", "share/", "seconds", "tokens_per_s")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "model"
    # Tied, so that the row of the values is one of the embedding as well.
    make_model(
        folder, num_hidden_layers=1, max_position_embeddings=32, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    return folder


def test_ppo_matches_plain_torch_and_resumes_after_a_kill_between_two_saves(model, tmp_path):
    place = tmp_path / "run"
    [ended] = run_ranks(train, 1, model, place, 2, 0, False)
    rows, hand = rows_of(place), ByHand(model)
    for step, row in enumerate(rows):
        figures = hand.step(place, step)
        assert {n: row[n] for n in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)
    assert rows[1]["value_clipped"] > 0 and rows[1]["clipped"] > 0 and rows[1]["unrewarded"] > 0
    for result, others in zip(ended, hand.models):
        for name, tensor in others.named_parameters():
            assert torch.allclose(result[name], tensor, atol=2e-4), name

    with pytest.raises(Exception, match=r"9|died|exit"):
        run_ranks(train, 1, model, place, 4, 0, True)
    before = rows_of(place)
    assert [row["step"] for row in before] == [1, 2, 3, 4]
    retained = {f.name for f in (place / "checkpoints" / "critic").iterdir()}
    assert retained == {"at_000002", "at_000004"}  # the critic is ahead of the policy
    run_ranks(train, 1, model, place, 4, 0, False)
    assert rows_of(place) == before
    assert [f.name for f in (place / "checkpoints" / "critic").iterdir()] == ["at_000004"]


def test_critic_warmup_trains_the_critic_alone_and_is_resumed(model, tmp_path):
    place = tmp_path / "run"
    [(policy, critic)] = run_ranks(train, 1, model, place, 2, 3, False)
    start = saved(model)
    assert all(torch.equal(policy[name], tensor) for name, tensor in start.items())
    assert any(not torch.equal(critic[name], tensor) for name, tensor in start.items())
    run_ranks(train, 1, model, place, 4, 3, False)
    rows = rows_of(place)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["loss" in row for row in rows] == [False, False, False, True]
    assert rows[2]["value"] != 0  # the weights from before the interruption
